//! Decides whether a request may be answered at all.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;

use super::ApiError;
use crate::config::ApiConfig;

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Look.
    Read,
    /// Sync, pause, resolve, verify and repair.
    Operate,
    /// Change the configuration, adopt a database.
    Admin,
}

impl Role {
    /// By its name in the configuration.
    pub fn named(name: &str) -> Self {
        match name {
            "admin" => Self::Admin,
            "operate" => Self::Operate,
            _ => Self::Read,
        }
    }

    /// What a request needs.
    fn needed(method: &Method, path: &str) -> Self {
        if method == Method::GET || method == Method::HEAD {
            Self::Read
        } else if path == "/api/sync/config" || path == "/api/sync/adopt" {
            Self::Admin
        } else {
            Self::Operate
        }
    }
}

/// Who asks; for the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The token's name, or the user at the other end of the socket.
    pub name: String,
    /// What they may do.
    pub role: Role,
}

/// Who may ask.
#[derive(Clone, Debug)]
pub struct Guard {
    /// Digests of the tokens: both sides of the comparison get the same length and reveal nothing.
    tokens: Vec<(blake3::Hash, Caller)>,
}

impl Guard {
    /// `None` when the address can be reached by other machines and there is no token: such an API is
    /// never served.
    pub fn new(address: SocketAddr, api: &ApiConfig) -> Option<Self> {
        let digest = |token: &SecretString| blake3::hash(token.expose_secret().as_bytes());
        let admin = api.token.iter().map(|token| {
            let name = "admin".to_owned();
            let role = Role::Admin;
            (digest(token), Caller { name, role })
        });
        let named = api.tokens.iter().map(|(name, given)| {
            let (name, role) = (name.clone(), given.role);
            (digest(&given.token), Caller { name, role })
        });
        let tokens: Vec<_> = admin.chain(named).collect();
        (!tokens.is_empty() || address.ip().is_loopback()).then_some(Self { tokens })
    }

    /// For the Unix socket, which lets in only who may open it.
    pub fn of_socket() -> Self {
        Self { tokens: vec![] }
    }

    fn allows(&self, method: &Method, path: &str, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let host = header(headers, HOST.as_str());
        let caller = match self.tokens.is_empty() {
            false => self.holder(headers).ok_or_else(|| {
                ApiError::new(
                    StatusCode::UNAUTHORIZED,
                    "a token is needed: send the header `Authorization: Bearer TOKEN`",
                )
            })?,
            true if !host.is_some_and(is_loopback_name) => {
                return Err(ApiError::new(
                    StatusCode::FORBIDDEN,
                    "without a token only requests addressed to localhost are answered",
                ));
            }
            true => Caller {
                name: "api".into(),
                role: Role::Admin,
            },
        };
        if caller.role < Role::needed(method, path) {
            return Err(ApiError::new(
                StatusCode::FORBIDDEN,
                format!("the token `{}` does not allow this", caller.name),
            ));
        }
        if method == Method::GET || method == Method::HEAD {
            return Ok(caller);
        }
        let from_elsewhere = header(headers, "sec-fetch-site")
            .is_some_and(|site| site == "cross-site" || site == "same-site")
            || headers.contains_key(ORIGIN)
                && header(headers, ORIGIN.as_str())
                    .and_then(|origin| origin.split_once("://"))
                    .is_none_or(|(_, authority)| Some(authority) != host);
        if from_elsewhere {
            return Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "requests from the pages of other sites are refused",
            ));
        }
        Ok(caller)
    }

    /// Whose token it is. All are compared, so that the time tells nothing.
    fn holder(&self, headers: &HeaderMap) -> Option<Caller> {
        let given = header(headers, AUTHORIZATION.as_str()).and_then(|value| {
            let (scheme, given) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| given.trim())
        })?;
        let given = blake3::hash(given.as_bytes());
        self.tokens.iter().fold(None, |found, (token, caller)| {
            let same: bool = given.as_bytes().ct_eq(token.as_bytes()).into();
            found.or(same.then(|| caller.clone()))
        })
    }
}

/// The middleware. A connection of the Unix socket brings its caller with it.
pub(super) async fn check(
    State(guard): State<Arc<Guard>>,
    mut request: Request,
    next: Next,
) -> Response {
    if request.extensions().get::<Caller>().is_some() {
        return next.run(request).await;
    }
    match guard.allows(request.method(), request.uri().path(), request.headers()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// `localhost`, `127.0.0.1`, `[::1]`, with or without a port.
fn is_loopback_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') && port.parse::<u16>().is_ok() => name,
        _ => host,
    };
    name.eq_ignore_ascii_case("localhost")
        || name
            .trim_start_matches('[')
            .trim_end_matches(']')
            .parse::<IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn roles_allow_what_they_say() {
        let config = "database = \"d\"\n[api.tokens.looker]\ntoken = \"l\"\nrole = \"read\"\n\
                      [api.tokens.desk]\ntoken = \"o\"\n[api.tokens.boss]\ntoken = \"a\"\nrole = \"admin\"\n";
        let api = Config::from_toml(config).unwrap().api;
        let guard = Guard::new("0.0.0.0:1".parse().unwrap(), &api).unwrap();
        let ask = |token: &str, method: &Method, path: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("authorization", format!("Bearer {token}").parse().unwrap());
            guard
                .allows(method, path, &headers)
                .map(|c| c.name)
                .map_err(|e| e.status.as_u16())
        };
        let (config, sync) = ("/api/sync/config", "/api/sync/sync");
        assert_eq!(ask("l", &Method::GET, config), Ok("looker".into()));
        assert_eq!(ask("l", &Method::POST, sync), Err(403));
        assert_eq!(ask("o", &Method::POST, sync), Ok("desk".into()));
        assert_eq!(ask("o", &Method::PUT, config), Err(403));
        assert_eq!(ask("a", &Method::PUT, config), Ok("boss".into()));
        assert_eq!(
            ask("o", &Method::POST, "/api/sync/verify"),
            Ok("desk".into())
        );
        assert_eq!(ask("o", &Method::POST, "/api/sync/adopt"), Err(403));
        assert_eq!(
            ask("l", &Method::GET, "/api/sync/plan"),
            Ok("looker".into())
        );
        assert_eq!(ask("x", &Method::GET, config), Err(401));
    }

    fn verdict(guard: &Guard, method: &Method, pairs: &[(&'static str, &str)]) -> u16 {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, value.parse().unwrap());
        }
        guard
            .allows(method, "/api/sync/sync", &headers)
            .map_or_else(|error| error.status.as_u16(), |_| 200)
    }

    fn guard(address: &str, token: Option<&str>) -> Option<Guard> {
        let mut api = Config::from_toml("database = \"d\"").unwrap().api;
        api.token = token.map(SecretString::from);
        Guard::new(address.parse().unwrap(), &api)
    }

    #[test]
    fn beyond_loopback_a_token_is_required() {
        assert!(guard("0.0.0.0:1", None).is_none());
        assert!(guard("[::]:1", None).is_none());
        assert!(guard("192.168.1.2:1", None).is_none());
        assert!(guard("0.0.0.0:1", Some("t")).is_some());
        assert!(guard("127.0.0.1:1", None).is_some());
        assert!(guard("[::1]:1", None).is_some());
    }

    #[test]
    fn only_the_exact_token_opens() {
        let guard = guard("0.0.0.0:1", Some("correct")).unwrap();
        for (value, expected) in [
            ("Bearer correct", 200),
            ("bearer correct", 200),
            ("Bearer correc", 401),
            ("Bearer correctx", 401),
            ("Bearer Correct", 401),
            ("Bearer ", 401),
            ("Bearer", 401),
            ("Basic correct", 401),
            ("correct", 401),
        ] {
            let headers = [("authorization", value), ("host", "temple.example:8840")];
            assert_eq!(verdict(&guard, &Method::GET, &headers), expected, "{value}");
        }
        assert_eq!(verdict(&guard, &Method::GET, &[]), 401);
    }

    #[test]
    fn without_a_token_the_host_must_be_loopback() {
        let guard = guard("127.0.0.1:8840", None).unwrap();
        for (host, expected) in [
            ("127.0.0.1:8840", 200),
            ("localhost", 200),
            ("LOCALHOST:8840", 200),
            ("[::1]:8840", 200),
            ("[::1]", 200),
            ("evil.example:8840", 403),
            ("127.0.0.1.evil.example", 403),
            ("localhost.evil.example", 403),
            ("192.168.1.2", 403),
            ("", 403),
        ] {
            assert_eq!(
                verdict(&guard, &Method::GET, &[("host", host)]),
                expected,
                "{host}"
            );
        }
        assert_eq!(verdict(&guard, &Method::GET, &[]), 403);
    }

    #[test]
    fn another_sites_page_changes_nothing() {
        let guard = guard("127.0.0.1:8840", None).unwrap();
        let host = ("host", "localhost:8840");
        for (headers, expected) in [
            (vec![host], 200),
            (vec![host, ("origin", "http://localhost:8840")], 200),
            (vec![host, ("origin", "http://localhost:3000")], 403),
            (vec![host, ("origin", "https://evil.example")], 403),
            (vec![host, ("origin", "null")], 403),
            (vec![host, ("sec-fetch-site", "cross-site")], 403),
            (vec![host, ("sec-fetch-site", "same-origin")], 200),
        ] {
            assert_eq!(
                verdict(&guard, &Method::POST, &headers),
                expected,
                "{headers:?}"
            );
        }
        let reading = [host, ("origin", "https://evil.example")];
        assert_eq!(
            verdict(&guard, &Method::GET, &reading),
            200,
            "the browser keeps the answer from it"
        );
    }
}

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

/// Who may ask.
#[derive(Clone, Debug)]
pub struct Guard {
    /// Digest of the token: both sides of the comparison get the same length and reveal nothing.
    token: Option<blake3::Hash>,
}

impl Guard {
    /// `None` when the address can be reached by other machines and there is no token: such an API is
    /// never served.
    pub fn new(address: SocketAddr, token: Option<&SecretString>) -> Option<Self> {
        let token = token.map(|token| blake3::hash(token.expose_secret().as_bytes()));
        (token.is_some() || address.ip().is_loopback()).then_some(Self { token })
    }

    fn allows(&self, method: &Method, headers: &HeaderMap) -> Result<(), ApiError> {
        let host = header(headers, HOST.as_str());
        match &self.token {
            Some(token) if !has_token(headers, token) => {
                return Err(ApiError::new(
                    StatusCode::UNAUTHORIZED,
                    "a token is needed: send the header `Authorization: Bearer TOKEN`",
                ));
            }
            None if !host.is_some_and(is_loopback_name) => {
                return Err(ApiError::new(
                    StatusCode::FORBIDDEN,
                    "without a token only requests addressed to localhost are answered",
                ));
            }
            _ => {}
        }
        if method == Method::GET || method == Method::HEAD {
            return Ok(());
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
        Ok(())
    }
}

/// The middleware.
pub(super) async fn check(
    State(guard): State<Arc<Guard>>,
    request: Request,
    next: Next,
) -> Response {
    match guard.allows(request.method(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn has_token(headers: &HeaderMap, token: &blake3::Hash) -> bool {
    let given = header(headers, AUTHORIZATION.as_str()).and_then(|value| {
        let (scheme, given) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| given.trim())
    });
    given.is_some_and(|given| {
        blake3::hash(given.as_bytes())
            .as_bytes()
            .ct_eq(token.as_bytes())
            .into()
    })
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

    fn verdict(guard: &Guard, method: &Method, pairs: &[(&'static str, &str)]) -> u16 {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, value.parse().unwrap());
        }
        guard
            .allows(method, &headers)
            .map_or_else(|error| error.status.as_u16(), |()| 200)
    }

    fn guard(address: &str, token: Option<&str>) -> Option<Guard> {
        Guard::new(
            address.parse().unwrap(),
            token.map(SecretString::from).as_ref(),
        )
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

//! The CLI's way to the daemon: one HTTP request over one connection.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use secrecy::{ExposeSecret, SecretString};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::config::ApiConfig;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Above the API's own limit, so that its explanation arrives.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(40);

/// Why a request brought nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// `[api] listen` is empty.
    #[error("the API is turned off (api.listen is empty), so the daemon can't be asked")]
    Off,
    /// Nobody listens there.
    #[error("no daemon answers on {address}")]
    Unreachable {
        /// Where it was looked for.
        address: String,
        /// Refused: certainly nobody is there, rather than somebody slow.
        refused: bool,
    },
    /// The connection broke or the answer made no sense.
    #[error("the daemon on {address} gave no proper answer: {reason}")]
    Broken {
        /// Who was asked.
        address: String,
        /// What was wrong.
        reason: String,
    },
    /// The daemon said no.
    #[error("{detail}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Its explanation.
        detail: String,
        /// The new state of a conflict that changed since it was shown.
        state: Option<Box<Value>>,
    },
}

impl ClientError {
    /// Exit code of a command that failed by this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Off | Self::Unreachable { .. } | Self::Broken { .. } => 69,
            Self::Refused {
                status: 503 | 504, ..
            } => 69,
            Self::Refused { status: 400, .. } => 2,
            Self::Refused { .. } => 1,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Off => {
                Some("set api.listen, for example to \"127.0.0.1:8840\", and restart the daemon")
            }
            Self::Unreachable { .. } => Some(
                "is the daemon running? Start it with `sangam run` or `systemctl start sangam`; it must \
                 use the same configuration (api.listen)",
            ),
            Self::Broken { .. } => {
                Some("is another program listening at that address? See api.listen")
            }
            Self::Refused { status: 401, .. } => Some(
                "set SANGAM_API_TOKEN (or api.token) to the token that the daemon was started with",
            ),
            Self::Refused { .. } => None,
        }
    }
}

/// Where the daemon is, and the token.
#[derive(Clone, Debug)]
pub struct Client {
    socket: Option<PathBuf>,
    address: Option<SocketAddr>,
    /// The address speaks TLS, which this client leaves to the socket.
    tls: bool,
    token: Option<SecretString>,
}

impl Client {
    /// A daemon that listens on all addresses is asked on loopback.
    pub fn new(api: &ApiConfig) -> Self {
        let address = api.address().map(|mut address| {
            match address.ip() {
                IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
                IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
                _ => {}
            }
            address
        });
        Self {
            socket: api.socket.clone(),
            address,
            tls: api.tls.is_some(),
            token: api.token.clone(),
        }
    }

    /// GET, with a deadline.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::GET, path, None, Some(ANSWER_TIMEOUT))
            .await
    }

    /// GET of what takes as long as it takes.
    pub async fn get_slow<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::GET, path, None, None).await
    }

    /// POST. Without a deadline: a sync takes as long as it takes.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<Value>,
    ) -> Result<T, ClientError> {
        self.request(Method::POST, path, body, None).await
    }

    /// PUT, with a deadline.
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Value,
    ) -> Result<T, ClientError> {
        self.request(Method::PUT, path, Some(body), Some(ANSWER_TIMEOUT))
            .await
    }

    /// GET of a list that comes in pages: the page, how many there are in all, where the next begins.
    pub async fn page<T: DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<(T, u64, Option<String>), ClientError> {
        let (body, headers) = self
            .request_with_headers(Method::GET, path, None, Some(ANSWER_TIMEOUT))
            .await?;
        let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
        let total = text("x-total-count").and_then(|n| n.parse().ok());
        Ok((body, total.unwrap_or(0), text("x-next").map(str::to_owned)))
    }

    /// The socket, where it can be opened; else the address.
    async fn connect(&self) -> Result<(Box<dyn Stream>, String), ClientError> {
        if let Some(path) = &self.socket
            && let Ok(Ok(stream)) = timeout(CONNECT_TIMEOUT, UnixStream::connect(path)).await
        {
            return Ok((Box::new(stream), "localhost".into()));
        }
        let unreachable = |address: String, refused| ClientError::Unreachable { address, refused };
        let Some(address) = self.address.filter(|_| !self.tls) else {
            return Err(match &self.socket {
                Some(path) => unreachable(path.display().to_string(), true),
                None => ClientError::Off,
            });
        };
        match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => Ok((Box::new(stream), address.to_string())),
            Ok(Err(error)) => {
                let refused = error.kind() == std::io::ErrorKind::ConnectionRefused;
                Err(unreachable(address.to_string(), refused))
            }
            Err(_) => Err(unreachable(address.to_string(), false)),
        }
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        deadline: Option<Duration>,
    ) -> Result<T, ClientError> {
        let answer = self.request_with_headers(method, path, body, deadline);
        Ok(answer.await?.0)
    }

    async fn request_with_headers<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        deadline: Option<Duration>,
    ) -> Result<(T, HeaderMap), ClientError> {
        let (stream, address) = self.connect().await?;
        let asked = address.clone();
        let broken = |reason: String| ClientError::Broken {
            address: asked.clone(),
            reason,
        };
        let exchange = Box::pin(self.exchange(stream, address, method, path, body));
        let (status, headers, bytes) = match deadline {
            Some(deadline) => timeout(deadline, exchange)
                .await
                .unwrap_or_else(|_| Err("it took too long".to_owned())),
            None => exchange.await,
        }
        .map_err(broken)?;
        if status.is_success() {
            let body = serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?;
            return Ok((body, headers));
        }
        let body = serde_json::from_slice::<Value>(&bytes).unwrap_or_default();
        let detail = body
            .get("detail")
            .and_then(|detail| Some(detail.as_str()?.to_owned()))
            .ok_or_else(|| broken(format!("HTTP status {status}")))?;
        Err(ClientError::Refused {
            status: status.as_u16(),
            detail,
            state: body.get("conflict").cloned().map(Box::new),
        })
    }

    async fn exchange(
        &self,
        stream: Box<dyn Stream>,
        address: String,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<(StatusCode, HeaderMap, Bytes), String> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| error.to_string())?;
        let connection = tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, address)
            .header(CONTENT_TYPE, "application/json");
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.expose_secret()));
        }
        let body = body.map_or_else(Bytes::new, |body| body.to_string().into());
        let request = request
            .body(Full::new(body))
            .map_err(|error| error.to_string())?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| error.to_string())?;
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = response
            .into_body()
            .collect()
            .await
            .map_err(|error| error.to_string())?
            .to_bytes();
        connection.abort();
        Ok((status, headers, bytes))
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A text as part of a path or query.
pub fn encoded(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b);
    text.bytes()
        .map(|b| {
            if plain(b) {
                char::from(b).to_string()
            } else {
                format!("%{b:02X}")
            }
        })
        .collect()
}

//! The CLI's way to the daemon: one HTTP request over one connection.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use secrecy::{ExposeSecret, SecretString};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::TcpStream;
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
        address: SocketAddr,
        /// Refused: certainly nobody is there, rather than somebody slow.
        refused: bool,
    },
    /// The connection broke or the answer made no sense.
    #[error("the daemon on {address} gave no proper answer: {reason}")]
    Broken {
        /// Who was asked.
        address: SocketAddr,
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
    address: Option<SocketAddr>,
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
            address,
            token: api.token.clone(),
        }
    }

    /// GET, with a deadline.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::GET, path, None, Some(ANSWER_TIMEOUT))
            .await
    }

    /// POST. Without a deadline: a sync takes as long as it takes.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<Value>,
    ) -> Result<T, ClientError> {
        self.request(Method::POST, path, body, None).await
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        deadline: Option<Duration>,
    ) -> Result<T, ClientError> {
        let address = self.address.ok_or(ClientError::Off)?;
        let stream = match timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                let refused = error.kind() == std::io::ErrorKind::ConnectionRefused;
                return Err(ClientError::Unreachable { address, refused });
            }
            Err(_) => {
                return Err(ClientError::Unreachable {
                    address,
                    refused: false,
                });
            }
        };
        let broken = |reason: String| ClientError::Broken { address, reason };
        let exchange = Box::pin(self.exchange(stream, address, method, path, body));
        let (status, bytes) = match deadline {
            Some(deadline) => timeout(deadline, exchange)
                .await
                .unwrap_or_else(|_| Err("it took too long".to_owned())),
            None => exchange.await,
        }
        .map_err(broken)?;
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()));
        }
        let detail = serde_json::from_slice::<Value>(&bytes)
            .ok()
            .and_then(|body| Some(body.get("detail")?.as_str()?.to_owned()))
            .ok_or_else(|| broken(format!("HTTP status {status}")))?;
        Err(ClientError::Refused {
            status: status.as_u16(),
            detail,
        })
    }

    async fn exchange(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> Result<(StatusCode, Bytes), String> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| error.to_string())?;
        let connection = tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, address.to_string())
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
        let status = response.status();
        let bytes = response
            .into_body()
            .collect()
            .await
            .map_err(|error| error.to_string())?
            .to_bytes();
        connection.abort();
        Ok((status, bytes))
    }
}

//! One HTTP request to somebody else: the heartbeat's and the webhook's.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HOST, USER_AGENT};
use hyper::{Method, Request, Uri};
use hyper_util::rt::TokioIo;
use secrecy::{ExposeSecret, SecretString};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

const PATIENCE: Duration = Duration::from_secs(15);

/// Why a request brought nothing. Never shows the address: it may hold a secret.
#[derive(Debug, thiserror::Error)]
pub enum OutgoingError {
    /// Not `http://` or `https://` with a host.
    #[error("is no http:// or https:// address")]
    Address,
    /// No connection.
    #[error("can't be reached: {0}")]
    Connect(std::io::Error),
    /// The exchange broke.
    #[error("gave no proper answer: {0}")]
    Broken(String),
    /// It took too long.
    #[error("did not answer in time")]
    Late,
    /// Anything but a success.
    #[error("answered with status {0}")]
    Status(u16),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Whether a request can be sent there at all.
pub fn is_address(text: &str) -> bool {
    text.parse::<Uri>().is_ok_and(|uri| parts(&uri).is_some())
}

/// Whether by TLS, host, port.
fn parts(uri: &Uri) -> Option<(bool, String, u16)> {
    let tls = match uri.scheme_str()? {
        "https" => true,
        "http" => false,
        _ => return None,
    };
    let host = uri.host()?.trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    // User and password in an address end up in logs of proxies; nobody needs them here.
    (!uri.authority()?.as_str().contains('@')).then_some((tls, host, port))
}

/// Sends `body` as JSON by POST, or asks by GET without one. Redirects are not followed.
pub async fn send(url: &SecretString, body: Option<Vec<u8>>) -> Result<(), OutgoingError> {
    tokio::time::timeout(PATIENCE, exchange(url, body))
        .await
        .unwrap_or(Err(OutgoingError::Late))
}

async fn exchange(url: &SecretString, body: Option<Vec<u8>>) -> Result<(), OutgoingError> {
    let uri: Uri = url
        .expose_secret()
        .parse()
        .map_err(|_| OutgoingError::Address)?;
    let (tls, host, port) = parts(&uri).ok_or(OutgoingError::Address)?;
    let stream = TcpStream::connect((host.as_str(), port))
        .await
        .map_err(OutgoingError::Connect)?;
    let stream: Box<dyn Stream> = if tls {
        let name = ServerName::try_from(host.clone()).map_err(|_| OutgoingError::Address)?;
        let connected = connector()?.connect(name, stream).await;
        Box::new(connected.map_err(OutgoingError::Connect)?)
    } else {
        Box::new(stream)
    };
    let broken = |e: hyper::Error| OutgoingError::Broken(e.to_string());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    let connection = tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let authority = uri.authority().map_or(host.as_str(), |a| a.as_str());
    let mut request = Request::builder()
        .method(if body.is_some() {
            Method::POST
        } else {
            Method::GET
        })
        .uri(path)
        .header(HOST, authority)
        .header(USER_AGENT, concat!("sangam/", env!("CARGO_PKG_VERSION")));
    if body.is_some() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    let request = request
        .body(Full::new(Bytes::from(body.unwrap_or_default())))
        .map_err(|_| OutgoingError::Address)?;
    let answer = sender.send_request(request).await.map_err(broken);
    connection.abort();
    match answer?.status() {
        status if status.is_success() => Ok(()),
        status => Err(OutgoingError::Status(status.as_u16())),
    }
}

/// Trusts the web's certificate authorities, as compiled in.
fn connector() -> Result<TlsConnector, OutgoingError> {
    let roots = RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    let config = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|e| OutgoingError::Broken(e.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, good) in [
            ("https://hc.example/ping/abc", true),
            ("http://127.0.0.1:9/x?y=1", true),
            ("http://[::1]:9/", true),
            ("ftp://x/", false),
            ("example.org/x", false),
            ("https://user:secret@example.org/", false),
            ("", false),
        ] {
            assert_eq!(is_address(text), good, "{text}");
        }
    }
}

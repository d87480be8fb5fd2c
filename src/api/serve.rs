//! Connections: plain, TLS, and from the Unix socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, crypto};
use tokio_util::sync::CancellationToken;

use super::dashboard::Live;
use super::guard::{Caller, Role};
use super::{Guard, READ_TIMEOUT, router};
use crate::dispatch::Dispatcher;

/// Time for answers that are being written when the daemon stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// More connections than this wait.
const MOST_CONNECTIONS: usize = 128;

/// Where the API is reached.
pub enum Listener {
    /// An address.
    Tcp(TcpListener),
    /// The same with TLS.
    Tls(TcpListener, TlsAcceptor),
    /// A socket file of mode 0600.
    Unix(UnixListener),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    /// Makes the socket file; one that is left over is replaced, one that is in use is not.
    pub fn unix(path: &Path) -> std::io::Result<Self> {
        use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
        if let Ok(about) = std::fs::symlink_metadata(path) {
            if !about.file_type().is_socket() {
                return Err(std::io::Error::other(
                    "a file that is no socket has that name",
                ));
            }
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(std::io::ErrorKind::AddrInUse.into());
            }
            std::fs::remove_file(path)?;
        }
        // Made in a folder that only we may enter and moved when its mode is right: nobody else can
        // connect in between.
        let folder = path.with_extension(format!("{}.new", std::process::id()));
        std::fs::create_dir(&folder)?;
        let made = (|| {
            std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700))?;
            let inside = folder.join("s");
            let listener = UnixListener::bind(&inside)?;
            std::fs::set_permissions(&inside, std::fs::Permissions::from_mode(0o600))?;
            std::fs::rename(&inside, path)?;
            Ok(Self::Unix(listener))
        })();
        std::fs::remove_dir_all(&folder)?;
        made
    }

    /// An address that speaks TLS, by PEM files of certificate chain and key.
    pub fn tls(listener: TcpListener, cert: &Path, key: &Path) -> Result<Self, String> {
        let unreadable =
            |file: &Path, e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
        let chain = CertificateDer::pem_file_iter(cert)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|e| unreadable(cert, &e))?;
        let private = PrivateKeyDer::from_pem_file(key).map_err(|e| unreadable(key, &e))?;
        let mut config =
            ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .map_err(|e| e.to_string())?
                .with_no_client_auth()
                .with_single_cert(chain, private)
                .map_err(|e| unreadable(cert, &e))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self::Tls(listener, TlsAcceptor::from(Arc::new(config))))
    }

    async fn accept(&self) -> std::io::Result<Incoming> {
        Ok(match self {
            Self::Tcp(listener) => Incoming::Plain(Box::new(listener.accept().await?.0)),
            Self::Tls(listener, acceptor) => {
                Incoming::Tls(listener.accept().await?.0, acceptor.clone())
            }
            Self::Unix(listener) => {
                let stream = listener.accept().await?.0;
                let caller = peer(&stream);
                Incoming::Known(Box::new(stream), caller)
            }
        })
    }
}

enum Incoming {
    Plain(Box<dyn Stream>),
    Tls(tokio::net::TcpStream, TlsAcceptor),
    Known(Box<dyn Stream>, Caller),
}

/// Who is at the other end of the socket, by the user's name.
fn peer(stream: &UnixStream) -> Caller {
    let uid = stream.peer_cred().map(|c| c.uid()).ok();
    let name = uid
        .and_then(user_name)
        .or(uid.map(|uid| format!("uid {uid}")));
    Caller {
        name: name.unwrap_or_else(|| "local user".into()),
        role: Role::Admin,
    }
}

fn user_name(uid: u32) -> Option<String> {
    let users = std::fs::read_to_string(PathBuf::from("/etc/passwd")).ok()?;
    users.lines().find_map(|line| {
        let mut parts = line.split(':');
        let name = parts.next()?;
        (parts.nth(1)? == uid.to_string()).then(|| name.to_owned())
    })
}

/// Serves until cancelled.
pub async fn serve(
    listener: Listener,
    dispatcher: Dispatcher,
    guard: Guard,
    cancel: CancellationToken,
) -> std::io::Result<()> {
    let live = Live::new(cancel.clone());
    let router = router(dispatcher.clone(), guard, Arc::clone(&live));
    let slots = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    connections.spawn(live.run(dispatcher));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            break;
        };
        let accepted = tokio::select! {
            biased;
            () = cancel.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        while connections.try_join_next().is_some() {}
        let incoming = match accepted {
            Ok(incoming) => incoming,
            Err(error) => {
                // Out of file descriptors, mostly; it passes.
                tracing::warn!(%error, "the API can't take a connection");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let (router, cancel) = (router.clone(), cancel.clone());
        connections.spawn(async move {
            let (stream, router): (Box<dyn Stream>, _) = match incoming {
                Incoming::Plain(stream) => (stream, router),
                Incoming::Known(stream, caller) => (stream, router.layer(Extension(caller))),
                Incoming::Tls(stream, acceptor) => {
                    match timeout(READ_TIMEOUT, acceptor.accept(stream)).await {
                        Ok(Ok(stream)) => (Box::new(stream), router),
                        // A client that speaks no TLS, or does not trust the certificate.
                        _ => return,
                    }
                }
            };
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(READ_TIMEOUT)
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
            let mut connection = std::pin::pin!(connection);
            // An error here is a client that hung up.
            tokio::select! {
                _ = connection.as_mut() => {}
                () = cancel.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    let _ = timeout(STOP_TIMEOUT, connection).await;
                }
            }
            drop(slot);
        });
    }
    while connections.join_next().await.is_some() {}
    Ok(())
}

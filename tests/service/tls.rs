//! Who gets in: TLS by a certificate made here, a token from a file that is nobody else's business, and
//! what a wrong token or too small a role is told.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use crate::common::snapshot::cli;
use crate::common::{Daemon, SOON, World, wait_until};
use rcgen::generate_simple_self_signed;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

fn written(path: &Path, text: &str, mode: u32) -> String {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    format!("{path:?}")
}

/// One request over TLS, trusting that certificate: the first line of the answer.
async fn ask(port: u16, trusted: &CertificateDer<'static>, token: &str) -> Result<String, String> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let provider = Arc::new(crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await;
    let stream = stream.map_err(|e| e.to_string())?;
    let name = ServerName::try_from("localhost").unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let mut stream = connector
        .connect(name, stream)
        .await
        .map_err(|e| e.to_string())?;
    let request = format!(
        "GET /api/sync/status HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    // The daemon may close without a last word of TLS.
    let _ = stream.read_to_string(&mut answer).await;
    Ok(answer.lines().next().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_and_a_token_file_guard_an_address() {
    let world = World::new("api_tls").await;
    let made = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let other = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let file = |name: &str| world.dir().join(name);
    let cert = written(&file("cert.pem"), &made.cert.pem(), 0o644);
    let key = written(&file("key.pem"), &made.key_pair.serialize_pem(), 0o600);
    let token = written(&file("token"), "from the file\n", 0o600);
    let settings = world.settings();
    let port = settings.api_port();
    let settings = settings
        .set("api.listen", &format!("\"0.0.0.0:{port}\""))
        .set("api.tls_cert", &cert)
        .set("api.tls_key", &key)
        .set("api.token_file", &token);
    let daemon = Daemon::spawn(&world, settings);
    let trusted = made.cert.der();
    wait_until(SOON, "TLS answers", async || {
        let answer = ask(port, trusted, "from the file").await?;
        (answer == "HTTP/1.1 200 OK").then_some(()).ok_or(answer)
    })
    .await;
    let wrong = ask(port, trusted, "from the fil").await.unwrap();
    assert_eq!(wrong, "HTTP/1.1 401 Unauthorized");
    let untrusted = ask(port, other.cert.der(), "from the file").await;
    assert!(untrusted.unwrap_err().contains("certificate"));
    // Without TLS nobody gets a word.
    let plain = crate::common::api::request(port, "GET", "/healthz", None, None).await;
    assert!(plain.is_err(), "{plain:?}");
    // The CLI comes by the socket.
    let (code, text) = cli(&daemon, &["status"]);
    assert_eq!(code, 0, "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_file_that_others_may_read_is_refused_and_a_wrong_token_told_what_to_do() {
    let world = World::new("api_token_file").await;
    let path = world.dir().join("token");
    let token = written(&path, "secret-of-the-file\n", 0o644);
    let settings = world.settings().set("api.token_file", &token);
    for (mode, text, words) in [
        (0o644, "secret-of-the-file\n", "chmod 600"),
        (0o640, "secret-of-the-file\n", "chmod 600"),
        (0o600, " \n", "is empty"),
    ] {
        written(&path, text, mode);
        let mut daemon = Daemon::spawn(&world, settings.clone());
        let ended = daemon.wait_exit().await;
        assert_eq!(ended.code(), Some(78), "{mode:o}");
        assert!(daemon.log().contains(words), "{mode:o}: {}", daemon.log());
        assert!(!daemon.log().contains("secret-of-the-file"), "R23");
    }
    written(&path, "secret-of-the-file\n", 0o600);
    // Without the socket, the CLI needs the token, too; it reads the same file.
    let settings = settings.set("api.socket", "\"\"");
    let daemon = Daemon::spawn(&world, settings.clone());
    wait_until(SOON, "it answers", async || {
        let (code, text) = cli(&daemon, &["status"]);
        (code == 0).then_some(()).ok_or(text)
    })
    .await;
    let mut stranger = settings
        .label("stranger")
        .unset("api.token_file")
        .set("api.token", "\"guessed\"");
    let told = stranger.cli(&["status"]);
    let told = String::from_utf8(told.stderr).unwrap();
    assert!(
        told.contains("token") && told.contains("SANGAM_API_TOKEN"),
        "{told}"
    );
    stranger = stranger.unset("api.token");
    assert_eq!(stranger.cli(&["status"]).status.code(), Some(1));
    assert!(!daemon.log().contains("secret-of-the-file"), "R23");
}

//! `sangam support-bundle`: a file for somebody who helps.

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::{Failure, Output};
use crate::bundle;
use crate::client::Client;
use crate::config::Loaded;

/// `log`: a file with the daemon's log; without it, the systemd journal is asked.
pub(super) async fn bundle(
    loaded: &Loaded,
    client: Client,
    (to, log): (Option<PathBuf>, Option<PathBuf>),
    output: Output,
) -> Result<ExitCode, Failure> {
    let failed =
        |what: &str, error: std::io::Error| Failure::new(format!("{what}: {error}"), None, 1);
    let log = match &log {
        Some(path) => std::fs::read(path)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .map_err(|e| failed(&path.display().to_string(), e))?,
        None => journal(),
    };
    let to = to.unwrap_or_else(|| {
        let now = chrono::Local::now().format("%Y%m%d-%H%M%S");
        PathBuf::from(format!("sangam-support-{now}.tar.gz"))
    });
    let shown = to.display().to_string();
    let file = std::fs::OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&to)
        .map_err(|e| failed(&shown, e))?;
    let names = Box::pin(bundle::write(file, loaded, &client, &log)).await;
    let names = names.map_err(|e| failed(&shown, e))?;
    output.answer(&json!({ "file": to, "contains": names }), || {
        format!(
            "{shown} has {}.\nPasswords, tokens and values of documents are taken out; look into it before \
             you send it: tar -xzOf {shown} | less",
            names.join(", ")
        )
    });
    Ok(ExitCode::SUCCESS)
}

/// The unit's last lines; nothing where there is no journal.
fn journal() -> String {
    let asked = std::process::Command::new("journalctl")
        .args([
            "-u",
            "sangam",
            "-n",
            "5000",
            "--no-pager",
            "-o",
            "short-iso",
        ])
        .output();
    asked.map_or(String::new(), |output| {
        String::from_utf8_lossy(&output.stdout).into_owned()
    })
}

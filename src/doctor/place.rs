//! The machine: configuration, files, disk, the daemon.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use secrecy::ExposeSecret as _;

use super::Report;
use crate::command::Status;
use crate::config::{Loaded, uri};
use crate::disk::free_bytes;

pub(super) fn config(report: &mut Report, loaded: &Loaded) {
    let config = &loaded.config;
    let Some(file) = loaded.file() else {
        report.good(
            "config",
            "no file; all values are defaults or from the environment",
        );
        return;
    };
    report.good("config", format!("{} is valid", file.display()));
    let remote = config.remote_uri.as_ref();
    let holds_secrets = loaded.entries().iter().any(|e| {
        let tells = match e.key.as_str() {
            "local.uri" => uri::holds_password(config.local_uri.expose_secret()),
            "remote.uri" => remote.is_some_and(|u| uri::holds_password(u.expose_secret())),
            _ => e.redacted,
        };
        tells && e.origin.starts_with("file")
    });
    if holds_secrets && is_open(file) {
        report.warn(
            "config",
            format!("{} holds a password and others may read it", file.display()),
            "whoever has an account on this machine can read the databases' passwords",
            [format!("chmod 600 {}", file.display())],
        );
    }
    if config.remote_uri.is_none() {
        report.warn(
            "config",
            "no remote database is configured",
            "changes are noted and wait here; nothing is sent",
            ["set MONGODB_CLOUD_URL in /etc/sangam/environment (mode 0600), then: systemctl restart sangam"],
        );
    }
}

/// Whether others than the owner may read it.
fn is_open(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|about| about.permissions().mode() & 0o077 != 0)
}

pub(super) fn files(report: &mut Report, loaded: &Loaded) {
    let config = &loaded.config;
    let dir = &config.state_dir;
    let shown = dir.display();
    match fs::metadata(dir) {
        Err(error) => report.bad(
            "files",
            format!("state_dir {shown} can't be read: {error}"),
            "without it no change survives a restart",
            [format!("mkdir -p {shown} && chown sangam: {shown} && chmod 700 {shown}")],
        ),
        Ok(about) if !about.is_dir() => report.bad(
            "files",
            format!("state_dir {shown} is no folder"),
            "without it no change survives a restart",
            ["name another folder as state_dir"],
        ),
        Ok(_) if rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_err() => report.bad(
            "files",
            format!("state_dir {shown} can't be written by this user"),
            "the daemon notes there what waits; run the doctor as the daemon's user if this is not so for it",
            [format!("chown -R sangam: {shown}")],
        ),
        Ok(_) => report.good("files", format!("state_dir {shown} can be written")),
    }
    for name in ["sangam.db", "api.sock", "audit.log"] {
        let file = dir.join(name);
        if is_open(&file) {
            report.warn(
                "files",
                format!("others may read {}", file.display()),
                "it holds contents of your documents",
                [format!("chmod 600 {}", file.display())],
            );
        }
    }
    let Some(free) = free_bytes(dir) else { return };
    let reserve = config.queue.min_free_disk;
    let free_mib = free >> 20;
    if free < reserve {
        report.bad(
            "files",
            format!("the disk of {shown} has {free_mib} MiB left, less than queue.min_free_disk"),
            "changes are no longer noted one by one; all is compared once there is room",
            [format!(
                "df -h {shown}; free at least {} MiB",
                (reserve >> 20) + 1
            )],
        );
    } else if free < reserve * 2 {
        report.warn(
            "files",
            format!("the disk of {shown} has {free_mib} MiB left"),
            "below queue.min_free_disk, changes are no longer noted one by one",
            [format!("df -h {shown}")],
        );
    } else {
        report.good("files", format!("{free_mib} MiB of disk are free"));
    }
}

/// Whether a daemon uses that folder.
pub(super) fn is_locked(dir: &Path) -> bool {
    fs::File::open(dir.join("sangam.lock")).is_ok_and(|file| {
        // Let go at once: the handle is closed here.
        matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock))
    })
}

pub(super) fn daemon(report: &mut Report, status: Option<&Status>, locked: bool) {
    let Some(status) = status else {
        if locked {
            report.warn(
                "daemon",
                "a daemon runs, but its API does not answer",
                "the commands of `sangam` can't reach it",
                ["check api.listen, api.socket and the token; journalctl -u sangam -n 50"],
            );
        } else {
            report.warn(
                "daemon",
                "no daemon runs",
                "nothing is noted or moved while it is down; what changes meanwhile is found at its start",
                ["systemctl start sangam"],
            );
        }
        return;
    };
    report.good("daemon", format!("runs, version {}", status.version));
    if let Some(ha) = &status.ha {
        report.good("daemon", crate::words::standing(ha));
    }
    if status.is_paused {
        report.warn(
            "daemon",
            "it is paused",
            "changes are noted, but nothing is moved",
            ["sangam resume"],
        );
    }
    if !status.is_capturing {
        report.bad(
            "daemon",
            "it does not note local changes",
            "what changes now is found later only by comparing everything",
            ["sangam status", "journalctl -u sangam -n 50"],
        );
    }
    for notice in &status.notices {
        report.warn(
            "daemon",
            notice.clone(),
            "the daemon says so",
            ["sangam status"],
        );
    }
    if status.unresolved_conflicts > 0 {
        report.warn(
            "daemon",
            crate::words::count(status.unresolved_conflicts, "open conflict"),
            "their documents differ between the two sides until somebody decides",
            ["sangam conflicts"],
        );
    }
}

//! The support bundle: what somebody who helps needs to see, and nothing that is nobody's business. No
//! secret and no value of a document is in it: ids and values are left out where they are known to
//! stand, and every text is searched for the secrets of the configuration.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};

use crate::client::Client;
use crate::config::Loaded;
use crate::doctor;

/// What stands for a secret.
const HIDDEN: &str = "***";
/// Lines of the log.
const LOG_LINES: usize = 5000;
/// Names under which an answer may hold a value of a document.
const VALUES: [&str; 12] = [
    "id",
    "localId",
    "remoteId",
    "localValue",
    "remoteValue",
    "localDocument",
    "remoteDocument",
    "baseDocument",
    "newValue",
    "notes",
    "recommendations",
    "keyValue",
];

/// Takes the secrets out of texts.
struct Redactor {
    secrets: Vec<String>,
}

impl Redactor {
    fn new(secrets: &[SecretString]) -> Self {
        let mut all = Vec::new();
        for secret in secrets {
            let text = secret.expose_secret();
            all.push(text.to_owned());
            // Of a URI also its parts, as a log might have them.
            if let Some((_, rest)) = text.split_once("://") {
                let user_info = rest.rsplit_once('@').map_or("", |(user_info, _)| user_info);
                if let Some((_, password)) = user_info.split_once(':') {
                    all.push(password.to_owned());
                    all.push(percent_decoded(password));
                }
            }
        }
        all.retain(|secret| secret.len() > 2);
        // The longest first: a part must not be taken out of the whole.
        all.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        Self { secrets: all }
    }

    fn text(&self, text: &str) -> String {
        let mut text = self
            .secrets
            .iter()
            .fold(text.to_owned(), |text, secret| text.replace(secret, HIDDEN));
        // Passwords of others that got into a log.
        let mut from = 0;
        while let Some(at) = text[from..].find("://").map(|at| from + at + 3) {
            let end = text[at..]
                .find(|c: char| c.is_whitespace() || "/?\"'<>".contains(c))
                .map_or(text.len(), |end| at + end);
            if let Some(user_info) = text[at..end].rfind('@') {
                text.replace_range(at..at + user_info, HIDDEN);
            }
            from = at;
        }
        text
    }

    /// The same in a value, with what may be of a document left out.
    fn json(&self, value: Value) -> Value {
        match value {
            Value::String(text) => self.text(&text).into(),
            Value::Array(items) => items.into_iter().map(|item| self.json(item)).collect(),
            Value::Object(map) => map
                .into_iter()
                .map(|(name, value)| {
                    let hidden = VALUES.contains(&name.as_str()) && !value.is_null();
                    let value = if hidden {
                        HIDDEN.into()
                    } else {
                        self.json(value)
                    };
                    (name, value)
                })
                .collect(),
            other => other,
        }
    }
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, more @ ..] = rest {
        let pair = more.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match pair.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &more[2..];
            }
            _ => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Writes the bundle, a gzipped tar; the names of what is in it. `log`: the daemon's log, as text.
pub async fn write(
    to: impl Write,
    loaded: &Loaded,
    client: &Client,
    log: &str,
) -> std::io::Result<Vec<String>> {
    let redactor = Redactor::new(&loaded.secrets());
    let mut files: Vec<(&str, Value)> = vec![
        ("versions.json", versions()),
        ("config.json", json!(loaded.entries())),
    ];
    for (name, path) in [
        ("status.json", "/api/sync/status"),
        ("runs.json", "/api/sync/logs?limit=100"),
        ("queue.json", "/api/sync/queue?limit=200"),
        (
            "conflicts.json",
            "/api/sync/conflicts?resolved=false&limit=200",
        ),
        ("settings.json", "/api/sync/config"),
    ] {
        let answer = client.get::<Value>(path).await;
        let answer = answer.unwrap_or_else(|error| json!({ "detail": error.to_string() }));
        let answer = match name {
            "conflicts.json" => brief(answer),
            _ => answer,
        };
        files.push((name, answer));
    }
    let report = Box::pin(doctor::examine(loaded, client)).await;
    files.push(("doctor.json", json!(report)));

    let mut archive = tar::Builder::new(GzEncoder::new(to, Compression::default()));
    let mut names = Vec::new();
    for (name, value) in files {
        let text = serde_json::to_string_pretty(&redactor.json(value))?;
        add(&mut archive, name, &text)?;
        names.push(name.to_owned());
    }
    let lines: Vec<&str> = log.lines().collect();
    let last = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
    add(&mut archive, "sangam.log", &redactor.text(&last))?;
    names.push("sangam.log".to_owned());
    archive.into_inner()?.finish()?.flush()?;
    Ok(names)
}

/// Of conflicts, only what sort they are.
fn brief(conflicts: Value) -> Value {
    let Value::Array(conflicts) = conflicts else {
        return conflicts;
    };
    let names = ["_id", "collection", "kind", "field", "timestamp"];
    let one = |conflict: &Value| {
        let kept = names
            .iter()
            .map(|name| ((*name).to_owned(), conflict[*name].clone()));
        Value::Object(kept.collect())
    };
    conflicts.iter().map(one).collect()
}

fn versions() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let os = read("/etc/os-release");
    let os = os
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="));
    json!({
        "sangam": env!("CARGO_PKG_VERSION"),
        "architecture": std::env::consts::ARCH,
        "os": os.unwrap_or(std::env::consts::OS).trim_matches('"'),
        "kernel": read("/proc/version").trim(),
        "madeAt": chrono::Utc::now(),
    })
}

fn add(archive: &mut tar::Builder<impl Write>, name: &str, text: &str) -> std::io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(text.len() as u64);
    header.set_mode(0o600);
    header.set_mtime(u64::try_from(chrono::Utc::now().timestamp()).unwrap_or(0));
    header.set_cksum();
    archive.append_data(
        &mut header,
        format!("sangam-support/{name}"),
        text.as_bytes(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_go_wherever_they_stand() {
        let uri = "mongodb://boss:p%40ss-word@db.example:27017/?tls=true";
        let redactor = Redactor::new(&[uri.into(), "token-7".into()]);
        for (text, want) in [
            (uri, "***"),
            ("with p@ss-word and p%40ss-word", "with *** and ***"),
            ("Bearer token-7", "Bearer ***"),
            (
                "see mongodb+srv://a:b@c.example/x, http://h/",
                "see mongodb+srv://***@c.example/x, http://h/",
            ),
        ] {
            assert_eq!(redactor.text(text), want);
        }
        let hidden = redactor.json(json!({"id": 7, "entries": [{"localValue": "x", "n": 1}]}));
        assert_eq!(
            hidden,
            json!({"id": "***", "entries": [{"localValue": "***", "n": 1}]})
        );
    }
}

//! `sangam init`: writes a configuration by asking, and tests the connections meanwhile.
//!
//! What is given as an option is not asked for; without a terminal nothing is. Addresses with a
//! password go into `.env` beside the file, which only its owner may read.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use secrecy::SecretString;
use serde_json::json;

use super::lone;
use super::{Failure, InitArgs, Output};
use crate::config::{Config, redact_uri};
use crate::decide::Side;
use crate::doctor::rights;
use crate::failure::Failure as Trouble;
use crate::side::Endpoint;

/// For reaching a server.
pub(super) const PATIENCE: Duration = Duration::from_secs(8);
/// Name of a replica set that is made here, where mongod was not told another.
pub(super) const SET: &str = "rs0";

/// Talks to the person at the terminal, if there is one.
pub(super) struct Talk {
    /// Whether there is somebody to answer.
    pub(super) asks: bool,
    output: Output,
}

impl Talk {
    pub(super) fn say(&self, text: &str) {
        if !self.output.json {
            // A closed terminal is no reason to stop.
            let _ = writeln!(anstream::stdout().lock(), "{text}");
        }
    }

    /// An answer; `default` for an empty one. `None` without anybody to ask.
    fn ask(&self, question: &str, default: &str) -> Option<String> {
        if !self.asks {
            return None;
        }
        let shown = if default.is_empty() {
            String::new()
        } else {
            format!(" [{default}]")
        };
        let _ = write!(anstream::stdout().lock(), "{question}{shown}: ");
        let _ = std::io::stdout().flush();
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line).unwrap_or(0) == 0 {
            return None;
        }
        let line = line.trim();
        Some(if line.is_empty() { default } else { line }.to_owned())
    }

    pub(super) fn yes(&self, question: &str) -> bool {
        self.ask(&format!("{question} (yes/no)"), "no")
            .is_some_and(|answer| {
                answer.eq_ignore_ascii_case("yes") || answer.eq_ignore_ascii_case("y")
            })
    }
}

pub(super) async fn init(args: InitArgs, output: Output) -> Result<ExitCode, Failure> {
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let talk = Talk {
        asks: terminal && !args.yes && !output.json,
        output,
    };
    let file = args
        .to
        .clone()
        .unwrap_or_else(|| PathBuf::from("sangam.toml"));
    let secrets = file.with_file_name(".env");
    for path in [&file, &secrets] {
        if path.exists() {
            return Err(Failure::new(
                format!(
                    "{} is there already, and is not overwritten",
                    path.display()
                ),
                Some("name another place with --to, or move it away"),
                1,
            ));
        }
    }
    let Some(database) = args
        .database
        .clone()
        .or_else(|| talk.ask("Which database is to be kept equal?", ""))
    else {
        return Err(Failure::new(
            "which database?",
            Some("name it with --database"),
            2,
        ));
    };
    let site = args
        .site
        .clone()
        .or_else(|| talk.ask("What is this place called?", "local"));
    let site = site.unwrap_or_else(|| "local".into());

    let default = format!("mongodb://127.0.0.1:27017/?replicaSet={SET}");
    let local = server(&talk, Side::Local, args.local.clone(), &default, &args).await?;
    let remote = server(&talk, Side::Remote, args.remote.clone(), "", &args).await?;

    let toml = toml(&database, &site, &local);
    let config = Config::from_toml(&toml)?;
    put(&file, &toml, 0o644)?;
    let environment = environment(&local, &remote);
    if !environment.is_empty() {
        put(&secrets, &environment, 0o600)?;
    }
    // As the daemon will read it.
    Config::load(Some(&file))?;
    let role = rights::create_role(&config);
    let answer = json!({
        "file": file, "secretsFile": (!environment.is_empty()).then_some(&secrets), "createRole": role,
    });
    output.answer(&answer, || {
        let kept = match environment.is_empty() {
            true => String::new(),
            false => format!(", and addresses with passwords to {} (mode 0600)", secrets.display()),
        };
        format!(
            "\nWritten to {}{kept}.\n\nFor users with no more rights than Sangam needs, type this in mongosh on \
             both sides (in Atlas: a custom role), and use them in the addresses:\n\n  {}\n\nNext: sangam --config \
             {} doctor, then: sangam run",
            file.display(),
            role.join("\n  "),
            file.display()
        )
    });
    Ok(ExitCode::SUCCESS)
}

/// Asks for an address until it works or is to be kept as it is.
async fn server(
    talk: &Talk,
    side: Side,
    mut given: Option<String>,
    default: &str,
    args: &InitArgs,
) -> Result<String, Failure> {
    let question = match side {
        Side::Local => "Address of the local database",
        Side::Remote => "Address of the remote one, as Atlas shows it (empty: later)",
    };
    loop {
        let uri = given.take().or_else(|| talk.ask(question, default));
        let uri = uri.unwrap_or_else(|| default.to_owned());
        if uri.is_empty() {
            return Ok(uri);
        }
        let key = side.name();
        // The same check, and the same words, as when the daemon starts.
        Config::from_toml(&format!(
            "database = \"d\"\n[{key}]\nuri = {}",
            quoted(&uri)
        ))?;
        let secret = SecretString::from(uri.clone());
        let mut outcome = look(side, &secret).await;
        if outcome.is_err() && side == Side::Local {
            outcome = lone::adopt(talk, args, &secret, outcome).await;
        }
        let shown = redact_uri(&secret);
        match outcome {
            Ok(set) => {
                talk.say(&format!("  {shown} answers (replica set {set})"));
                return Ok(uri);
            }
            Err(trouble) => {
                talk.say(&format!("  {shown} can't be used: {trouble}"));
                if talk.asks {
                    if talk.yes("Keep this address all the same?") {
                        return Ok(uri);
                    }
                } else if side == Side::Local && !args.force {
                    return Err(Failure::new(
                        format!("{shown} can't be used: {trouble}"),
                        Some("--force writes the configuration all the same"),
                        69,
                    ));
                } else {
                    return Ok(uri);
                }
            }
        }
    }
}

/// The replica set that answers there.
pub(super) async fn look(side: Side, uri: &SecretString) -> Result<String, Trouble> {
    let endpoint = Endpoint::connect_as("sangam init", side, uri, PATIENCE).await?;
    Ok(endpoint.hello().await?.set_name)
}

/// A text in TOML.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn has_password(uri: &str) -> bool {
    uri.contains('@')
}

fn toml(database: &str, site: &str, local: &str) -> String {
    let names: Vec<String> = database
        .split(',')
        .map(|name| quoted(name.trim()))
        .collect();
    let database = match names.as_slice() {
        [one] => one.clone(),
        _ => format!("[{}]", names.join(", ")),
    };
    let mut text = format!(
        "# Made by `sangam init`. Every other setting has its default: `sangam config` lists them all, and\n\
         # the example that came with Sangam explains them.\n\ndatabase = {database}\nsite = {}\n",
        quoted(site)
    );
    if !has_password(local) {
        text += &format!("\n[local]\nuri = {}\n", quoted(local));
    }
    text
}

/// Of `.env`. An apostrophe in an address means the same as `%27`.
fn environment(local: &str, remote: &str) -> String {
    let line = |name: &str, uri: &str| format!("{name}='{}'\n", uri.replace('\'', "%27"));
    let mut text = String::new();
    if has_password(local) {
        text += &line("MONGODB_LOCAL_URL", local);
    }
    if !remote.is_empty() {
        text += &line("MONGODB_CLOUD_URL", remote);
    }
    text
}

fn put(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    std::fs::OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(|error| Failure::new(format!("{}: {error}", path.display()), None, 1))
}

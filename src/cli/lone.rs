//! A local server that belongs to no replica set: what its administrator has to change, and making
//! it a set of one. Its configuration and its restart stay in the administrator's hands.

use std::time::{Duration, Instant};

use bson::{Document, doc};
use mongodb::options::ClientOptions;
use secrecy::{ExposeSecret as _, SecretString};

use super::InitArgs;
use super::init::{PATIENCE, SET, Talk, look};
use crate::decide::Side;
use crate::failure::{Class, Failure as Trouble, Reason, UNAUTHORIZED};

/// How often a server that is to be restarted is looked at.
const PAUSE: Duration = Duration::from_secs(1);
/// A set of one elects itself within seconds.
const ELECTION: Duration = Duration::from_secs(15);
/// Where the packages of MongoDB have it, for a server that may not be asked.
const CONFIG_FILE: &str = "/etc/mongod.conf";
/// For the servers of a set to know each other; one with passwords needs it, even alone.
const KEY_FILE: &str = "/etc/mongod.keyfile";

/// A server that is there, and no member of a set (yet).
struct Lone {
    database: mongodb::Database,
    host: String,
    /// Its configuration, from file and arguments.
    options: Document,
}

/// Makes the server that could not be used a set of one, if that is what is wrong and if told to.
pub(super) async fn adopt(
    talk: &Talk,
    args: &InitArgs,
    uri: &SecretString,
    found: Result<String, Trouble>,
) -> Result<String, Trouble> {
    let Some(mut server) = Lone::find(uri).await? else {
        return found;
    };
    let mut told = args.initiate;
    if server.set().is_none() {
        talk.say(&server.advice());
        let not_yet = Err(Trouble::offline(Reason::NotAReplicaSet).of(Side::Local));
        told |= talk.yes("Wait here for the restart, and make it a replica set then?");
        // Somebody at the terminal ends the waiting by Ctrl-C.
        let limit = args.wait.or((!talk.asks).then_some(Duration::ZERO));
        if !told || limit == Some(Duration::ZERO) {
            return not_yet;
        }
        talk.say("  Waiting for the restart (Ctrl-C ends this; nothing has been written yet) …");
        let end = limit.map(|limit| Instant::now() + limit);
        server = loop {
            match Lone::find(uri).await {
                Ok(Some(server)) if server.set().is_some() => break server,
                // Somebody else made it one.
                Ok(None) => {
                    if let Ok(set) = look(Side::Local, uri).await {
                        return Ok(set);
                    }
                }
                // While it stops and starts it answers in all sorts of ways.
                _ => {}
            }
            if end.is_some_and(|end| Instant::now() >= end) {
                return not_yet;
            }
            tokio::time::sleep(PAUSE).await;
        };
    }
    let Some(set) = server.set().map(str::to_owned) else {
        return found;
    };
    let host = &server.host;
    if !told
        && !talk.yes(&format!(
            "{host} waits to become the replica set {set}. Make it one?"
        ))
    {
        talk.say(&format!(
            "  {host} waits to become the replica set {set}: --initiate makes it one."
        ));
        return found;
    }
    let member = doc! {"_id": 0, "host": host};
    let command = doc! {"replSetInitiate": {"_id": &set, "members": [member]}};
    if let Err(error) = server.database.run_command(command).await {
        return Err(Trouble::from(&error).of(Side::Local));
    }
    talk.say(&format!(
        "  {host} is now the replica set {set}, and is known by that name: an app on another machine must \
         reach it as {host}, or name no replica set in its own address."
    ));
    let end = Instant::now() + ELECTION;
    loop {
        match look(Side::Local, uri).await {
            Err(trouble)
                if matches!(trouble.class, Class::Offline(_) | Class::Transient)
                    && Instant::now() < end => {}
            outcome => return outcome,
        }
        tokio::time::sleep(PAUSE / 2).await;
    }
}

impl Lone {
    /// Asks that very server, whatever set it should belong to; `None` if it belongs to one, or is
    /// away. An error says that it wants another user.
    async fn find(uri: &SecretString) -> Result<Option<Self>, Trouble> {
        let Ok(mut options) = ClientOptions::parse(uri.expose_secret()).await else {
            return Ok(None);
        };
        options.hosts.truncate(1);
        options.direct_connection = Some(true);
        options.repl_set_name = None;
        options.server_selection_timeout = Some(PATIENCE);
        let Some(host) = options.hosts.first().map(ToString::to_string) else {
            return Ok(None);
        };
        let Ok(client) = mongodb::Client::with_options(options) else {
            return Ok(None);
        };
        let database = client.database("admin");
        match database.run_command(doc! {"hello": 1}).await {
            Ok(hello) if !hello.contains_key("setName") && !hello.contains_key("msg") => {}
            _ => return Ok(None),
        }
        let options = match database.run_command(doc! {"getCmdLineOpts": 1}).await {
            Ok(started) => started.get_document("parsed").cloned().unwrap_or_default(),
            Err(error) => {
                let mut trouble = Trouble::from(&error).of(Side::Local);
                if trouble.code == Some(UNAUTHORIZED) {
                    trouble.what = format!(
                        "{host} is in no replica set, and does not tell this user how it was started: give the \
                         address with its administrator's name and password"
                    );
                    trouble.code = None;
                    return Err(trouble);
                }
                Document::new()
            }
        };
        Ok(Some(Self {
            database,
            host,
            options,
        }))
    }

    fn option(&self, section: &str, names: &[&str]) -> Option<&str> {
        let section = self.options.get_document(section).ok()?;
        names.iter().find_map(|name| section.get_str(name).ok())
    }

    /// The set it was started for, and waits to be told of.
    fn set(&self) -> Option<&str> {
        self.option("replication", &["replSetName", "replSet"])
    }

    /// What to change so that it can become a set, to be typed as it stands.
    fn advice(&self) -> String {
        let needs_key = self.option("security", &["authorization"]) == Some("enabled")
            && self
                .option("security", &["keyFile", "clusterAuthMode"])
                .is_none();
        let mut lines = vec![format!(
            "  {} is a standalone server. Sangam needs a replica set (of one server is enough). On its machine:",
            self.host
        )];
        if needs_key {
            let data = self
                .option("storage", &["dbPath"])
                .unwrap_or("/var/lib/mongodb");
            lines.push(format!(
                "\n  It asks for passwords, and so needs a key file too:\n\n      \
                 (umask 077 && openssl rand -base64 756 > {KEY_FILE})\n      \
                 chown --reference={data} {KEY_FILE} && chmod 400 {KEY_FILE}"
            ));
        }
        let file = self.options.get_str("config").ok();
        if file.is_none() && !self.options.is_empty() {
            let key = if needs_key {
                format!(" --keyFile {KEY_FILE}")
            } else {
                String::new()
            };
            lines.push(format!(
                "\n  Start mongod as before, with these arguments more:\n\n      --replSet {SET}{key}"
            ));
        } else {
            let section = |name: &str| {
                let there = self.options.contains_key(name);
                let note = if there {
                    "      # is there already: only the next line"
                } else {
                    ""
                };
                format!("      {name}:{note}")
            };
            lines.push(format!("\n  In {}:\n", file.unwrap_or(CONFIG_FILE)));
            lines.push(section("replication"));
            lines.push(format!("        replSetName: {SET}"));
            if needs_key {
                lines.push(section("security"));
                lines.push(format!("        keyFile: {KEY_FILE}"));
            }
            lines.push("\n  Then: systemctl restart mongod".into());
        }
        lines.push("\n  and run this again with --initiate, unless it waits here.".into());
        lines.join("\n")
    }
}

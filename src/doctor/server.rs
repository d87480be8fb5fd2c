//! One database server: can it be reached, is it fit, may we do what we have to.

use std::sync::Arc;
use std::time::Duration;

use bson::{Document, doc};
use mongodb::options::ClientOptions;
use secrecy::{ExposeSecret as _, SecretString};

use super::{Report, rights};
use crate::config::{Config, Loaded, redact_uri};
use crate::decide::Side;
use crate::failure::{Class, Failure, Reason};
use crate::side::{Endpoint, Hello};

/// For reaching a server.
const PATIENCE: Duration = Duration::from_secs(8);
/// A shorter oplog window warns.
const OPLOG_HOURS: f64 = 24.0;
/// Oldest version that works.
const OLDEST: (u32, u32) = (6, 0);
/// Room of a free Atlas cluster.
const FREE_TIER_BYTES: f64 = 512.0 * 1024.0 * 1024.0;

/// A server that answers.
pub(super) struct Server {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) hello: Hello,
}

/// Looks at one side; `None` if it can't be used. `locked`: a daemon of this machine runs.
pub(super) async fn look(
    report: &mut Report,
    side: Side,
    loaded: &Loaded,
    locked: bool,
) -> Option<Server> {
    let config = &loaded.config;
    let uri = match side {
        Side::Local => &config.local_uri,
        Side::Remote => config.remote_uri.as_ref()?,
    };
    let check = side.name();
    let shown = redact_uri(uri);
    let reached = async {
        let endpoint = Endpoint::connect_as("sangam doctor", side, uri, PATIENCE).await?;
        let hello = endpoint.hello().await?;
        Ok::<_, Failure>((Arc::new(endpoint), hello))
    };
    let (endpoint, hello) = match reached.await {
        Ok(reached) => reached,
        Err(failure) => {
            unreachable(report, side, (uri, &shown), &failure).await;
            return None;
        }
    };
    report.good(
        check,
        format!("{shown} answers (replica set {})", hello.set_name),
    );
    version(report, &endpoint).await;
    if !hello.writable && side == Side::Local {
        report.warn(
            check,
            "the server that answered is no primary",
            "writes wait until the set has a primary",
            ["mongosh --eval 'rs.status()'"],
        );
    }
    privileges(report, &endpoint, config).await;
    streams(report, &endpoint, config).await;
    oplog(report, &endpoint).await;
    if side == Side::Remote {
        quota(report, &endpoint, uri, config).await;
    }
    if side == Side::Local {
        let own = usize::from(locked);
        others(report, &endpoint, own, config.ha.enabled).await;
    }
    Some(Server { endpoint, hello })
}

/// Says how far one gets: name, address, encryption, password.
async fn unreachable(
    report: &mut Report,
    side: Side,
    (uri, shown): (&SecretString, &str),
    failure: &Failure,
) {
    let check = side.name();
    let key = format!("{check}.uri");
    if let Class::Offline(Reason::Dns | Reason::Refused | Reason::Timeout | Reason::Offline) =
        failure.class
    {
        steps(report, side, uri).await;
    }
    let why = match side {
        Side::Local => "without the local database nothing can be noted",
        Side::Remote => "changes wait here until the remote can be reached",
    };
    let fix = match failure.class {
        Class::Offline(Reason::Dns) => {
            vec![format!("check the host in {key}, and: getent hosts NAME")]
        }
        Class::Offline(Reason::NotAReplicaSet) => vec![
            "start mongod with --replSet rs0 (in /etc/mongod.conf: replication.replSetName: rs0), then once:".into(),
            "mongosh --eval 'rs.initiate()'".into(),
            "or let `sangam init` do it".into(),
        ],
        Class::Offline(Reason::BadCredentials) => {
            vec![format!("correct user and password in {key}; special characters are written %XX")]
        }
        Class::Offline(Reason::IpNotAllowed) => vec![
            "in Atlas, under Network Access, add this network's address: curl -s https://api.ipify.org".into(),
        ],
        Class::Offline(Reason::Tls) => vec!["check this machine's date, and tls options of the URI".into()],
        Class::Offline(_) if side == Side::Local => vec!["systemctl status mongod".into()],
        _ => vec!["is the network up? Is port 27017 open to the outside?".into()],
    };
    report.bad(check, format!("{shown} can't be used: {failure}"), why, fix);
}

/// Name and port of each server, one after the other.
async fn steps(report: &mut Report, side: Side, uri: &SecretString) {
    let check = side.name();
    let parsed = tokio::time::timeout(PATIENCE, ClientOptions::parse(uri.expose_secret())).await;
    let Ok(Ok(options)) = parsed else {
        report.bad(
            check,
            "the servers' names can't be looked up",
            "without them nobody can be asked",
            ["is there internet? ping 1.1.1.1; is the host misspelt?"],
        );
        return;
    };
    for host in &options.hosts {
        let reached = tokio::time::timeout(
            Duration::from_secs(4),
            tokio::net::TcpStream::connect(host.to_string()),
        );
        match reached.await {
            Ok(Ok(_)) => report.good(check, format!("{host} can be reached")),
            Ok(Err(error)) => report.bad(
                check,
                format!("{host} can't be reached: {}", error.kind()),
                "no connection, no sync",
                [format!("nc -vz {}", host.to_string().replace(':', " "))],
            ),
            Err(_) => report.bad(
                check,
                format!("{host} does not answer"),
                "a firewall may swallow the connection, or the address is wrong",
                [format!("nc -vz {}", host.to_string().replace(':', " "))],
            ),
        }
    }
}

async fn version(report: &mut Report, endpoint: &Endpoint) {
    let Ok(info) = endpoint.run_doc("admin", doc! {"buildInfo": 1}).await else {
        return;
    };
    let version = info.get_str("version").unwrap_or("unknown");
    let mut parts = version
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let found = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    let check = endpoint.side.name();
    if found < OLDEST {
        report.bad(
            check,
            format!("MongoDB {version} is older than 6.0"),
            "older servers lack what guarded writes need",
            ["upgrade the server to 6.0 or later"],
        );
    } else {
        report.good(check, format!("MongoDB {version}"));
    }
}

async fn privileges(report: &mut Report, endpoint: &Endpoint, config: &Config) {
    let check = endpoint.side.name();
    let asked = doc! {"connectionStatus": 1, "showPrivileges": true};
    let Ok(reply) = endpoint.run_doc("admin", asked).await else {
        return;
    };
    let info = reply.get_document("authInfo").cloned().unwrap_or_default();
    let documents = |name: &str| -> Vec<Document> {
        let found = info.get_array(name).into_iter().flatten();
        found.filter_map(|d| d.as_document().cloned()).collect()
    };
    if documents("authenticatedUsers").is_empty() {
        report.good(check, "no user is named, so no rights are needed");
        return;
    }
    let granted = documents("authenticatedUserPrivileges");
    let mut fine = true;
    for db in &config.databases {
        let lacking = rights::lacking(&granted, db, config);
        if !lacking.is_empty() {
            fine = false;
            report.bad(
                check,
                format!("the user lacks rights on {db}: {}", lacking.join(", ")),
                "some changes can't be read or written",
                rights::create_role(config),
            );
        }
    }
    if fine {
        report.good(check, "the user has all rights that are needed");
    }
    for (wish, without) in rights::wished(&granted) {
        report.good(check, format!("without the right {wish}: {without}"));
    }
}

/// Opens a change stream and closes it again.
async fn streams(report: &mut Report, endpoint: &Endpoint, config: &Config) {
    let check = endpoint.side.name();
    for db in &config.databases {
        let opened = tokio::time::timeout(PATIENCE, async {
            endpoint.client().database(db).watch().await
        });
        let failure = match opened.await {
            Ok(Ok(_)) => {
                report.good(check, format!("changes of {db} can be followed"));
                continue;
            }
            Ok(Err(error)) => endpoint.failure(&error),
            Err(_) => Failure::timeout().of(endpoint.side),
        };
        let what = format!("changes of {db} can't be followed: {failure}");
        match endpoint.side {
            Side::Local => report.bad(
                check,
                what,
                "without the local change stream nothing can be noted",
                rights::create_role(config),
            ),
            Side::Remote => report.warn(
                check,
                what,
                "the remote is asked at intervals instead: its deletions arrive with the nightly comparison only",
                ["give the remote's user the role readWrite on the database; small tiers may offer no change stream"],
            ),
        }
    }
}

/// For how long the oplog reaches back, at the rate at which it was written.
async fn oplog(report: &mut Report, endpoint: &Arc<Endpoint>) {
    let check = endpoint.side.name();
    let edge = async |order: i32| -> Option<u32> {
        let command = doc! {
            "find": "oplog.rs", "sort": {"$natural": order}, "limit": 1, "projection": {"ts": 1},
            "singleBatch": true,
        };
        let reply = endpoint.run_doc("local", command).await.ok()?;
        let batch = reply
            .get_document("cursor")
            .ok()?
            .get_array("firstBatch")
            .ok()?;
        Some(batch.first()?.as_document()?.get_timestamp("ts").ok()?.time)
    };
    let (Some(first), Some(last)) = (edge(1).await, edge(-1).await) else {
        report.good(
            check,
            "how far its oplog reaches back can't be read (no right to); nothing depends on it",
        );
        return;
    };
    let stats = endpoint
        .run_doc("local", doc! {"collStats": "oplog.rs"})
        .await;
    let number = |name: &str| {
        let value = stats.as_ref().ok()?.get(name)?;
        value
            .as_f64()
            .or(value.as_i64().map(|n| n as f64))
            .or(value.as_i32().map(f64::from))
    };
    let full = match (number("size"), number("maxSize")) {
        (Some(size), Some(most)) if size > 0.0 && most > size => most / size,
        _ => 1.0,
    };
    let hours = f64::from(last.saturating_sub(first)) / 3600.0 * full;
    if hours >= OPLOG_HOURS {
        report.good(
            check,
            format!("the oplog reaches back {} at the present rate", span(hours)),
        );
        return;
    }
    // A server that was started a moment ago tells nothing yet.
    if f64::from(last.saturating_sub(first)) < 600.0 && full > 1.0 {
        report.good(
            check,
            "the oplog is too young to tell how far it will reach",
        );
        return;
    }
    let mib = number("maxSize").map_or(990.0, |most| most / 1048576.0);
    let wanted = (mib * (OPLOG_HOURS * 2.0 / hours.max(0.1))).clamp(990.0, 51_200.0);
    report.warn(
        check,
        format!("the oplog reaches back only {} at the present rate", span(hours)),
        "if Sangam is away for longer, everything has to be compared; nothing is lost, but it takes time",
        [format!("mongosh --eval 'db.adminCommand({{replSetResizeOplog: 1, size: {wanted:.0}}})'")],
    );
}

fn span(hours: f64) -> String {
    crate::words::span(Duration::from_secs_f64((hours * 3600.0).clamp(0.0, 1e9)))
}

/// Storage of a small Atlas tier.
async fn quota(report: &mut Report, endpoint: &Endpoint, uri: &SecretString, config: &Config) {
    if !redact_uri(uri).contains(".mongodb.net") {
        return;
    }
    let mut used = 0.0;
    for db in &config.databases {
        if let Ok(stats) = endpoint.run_doc(db, doc! {"dbStats": 1}).await {
            used += ["dataSize", "indexSize"]
                .into_iter()
                .filter_map(|name| stats.get_f64(name).ok())
                .sum::<f64>();
        }
    }
    let mib = used / 1048576.0;
    if used > FREE_TIER_BYTES * 0.8 {
        report.warn(
            "remote",
            format!("its data take {mib:.0} MiB; a free cluster has room for 512 MiB"),
            "when the quota is used up, Atlas refuses every write",
            ["look at the cluster's tier in Atlas, and choose a larger one if it is a free one"],
        );
    } else {
        report.good("remote", format!("its data take {mib:.0} MiB"));
    }
}

/// Connections of a daemon that is not the one of this state.
async fn others(report: &mut Report, endpoint: &Endpoint, own: usize, ha: bool) {
    let command = doc! {
        "aggregate": 1, "cursor": {}, "pipeline": [
            {"$currentOp": {"allUsers": true, "idleConnections": true}},
            {"$match": {"appName": "sangam"}},
            {"$group": {"_id": {"$arrayElemAt": [{"$split": ["$client", ":"]}, 0]}}},
        ],
    };
    // Without the right to look, nothing is said.
    let Ok(reply) = endpoint.run_doc("admin", command).await else {
        return;
    };
    let batch = reply
        .get_document("cursor")
        .and_then(|c| c.get_array("firstBatch"));
    let hosts: Vec<&str> = batch
        .into_iter()
        .flatten()
        .filter_map(|d| d.as_document()?.get_str("_id").ok())
        .collect();
    if hosts.len() > own && ha {
        let from = format!("Sangam is connected from {}; one works", hosts.join(", "));
        report.good("local", from);
    } else if hosts.len() > own {
        report.warn(
            "local",
            format!("another Sangam is connected, from {}", hosts.join(", ")),
            "two daemons on the same pair do the work twice and may undo each other's resolutions",
            [
                "systemctl stop sangam on the other machine; the state of one is enough",
                "or set ha.enabled = true on every one of them: then exactly one works",
            ],
        );
    }
}

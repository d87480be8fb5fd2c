//! What a driver's error means for us: one table, from kinds, codes and labels, never from text.

use mongodb::error::{Error, ErrorKind};

use crate::decide::Side;

/// Why a database can't be used, as an owner understands it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No way to the network, or the connection broke.
    Offline,
    /// The name can't be resolved.
    Dns,
    /// Nothing listens there.
    Refused,
    /// No answer in time.
    Timeout,
    /// The encrypted connection can't be set up.
    Tls,
    /// User or password are wrong.
    BadCredentials,
    /// Atlas closes the connection: this address is not on the access list.
    IpNotAllowed,
    /// The cluster is paused or its storage quota is used up.
    PausedOrOverQuota,
    /// A standalone server: it has no change streams.
    NotAReplicaSet,
}

impl Reason {
    /// As in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Offline => "offline",
            Self::Dns => "dns",
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Tls => "tls",
            Self::BadCredentials => "bad_credentials",
            Self::IpNotAllowed => "ip_not_allowed",
            Self::PausedOrOverQuota => "paused_or_over_quota",
            Self::NotAReplicaSet => "not_a_replica_set",
        }
    }

    /// What it means and what to do, for a person, where the local database has it.
    fn message_of_local(self) -> &'static str {
        match self {
            Self::Offline => {
                "the connection to the local database broke: is mongod running? Nothing is lost meanwhile"
            }
            Self::Dns => {
                "the local database's name can't be resolved: is the host in local.uri misspelt?"
            }
            Self::Refused => {
                "nothing answers at the local database's address: is mongod running, and is the port in local.uri right?"
            }
            Self::Timeout => {
                "the local database does not answer in time: is mongod running, and not overloaded?"
            }
            Self::Tls => {
                "no encrypted connection to the local database can be set up: check tls settings of local.uri"
            }
            Self::BadCredentials => {
                "the local database refuses user or password: correct them in local.uri"
            }
            Self::IpNotAllowed | Self::PausedOrOverQuota => {
                "the local database refuses what it is asked: look at mongod's log"
            }
            Self::NotAReplicaSet => self.message(),
        }
    }

    /// What it means and what to do, for a person, where the remote has it.
    pub fn message(self) -> &'static str {
        match self {
            Self::Offline => {
                "the connection to the remote database broke; changes wait here until it is back"
            }
            Self::Dns => {
                "the remote's name can't be resolved: either there is no internet, or the host in remote.uri is misspelt"
            }
            Self::Refused => {
                "nothing answers at the remote's address: is the database running, and is the port right?"
            }
            Self::Timeout => "the remote does not answer in time; changes wait here until it does",
            Self::Tls => {
                "no encrypted connection can be set up: check tls settings of remote.uri and this machine's date"
            }
            Self::BadCredentials => {
                "the remote refuses user or password: correct them in remote.uri"
            }
            Self::IpNotAllowed => {
                "the remote closes the connection at once: add this network's address to the access list in Atlas"
            }
            Self::PausedOrOverQuota => {
                "the cluster is paused or its storage quota is used up: look at its page in Atlas"
            }
            Self::NotAReplicaSet => {
                "that server is a standalone one, which has no change stream: start mongod with --replSet rs0 and run rs.initiate() once"
            }
        }
    }
}

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The side can't be reached: wait for the link.
    Offline(Reason),
    /// Try again soon: an election, an interrupted operation.
    Transient,
    /// The stream's position is gone from the oplog: reconcile (R11).
    HistoryLost,
    /// The server refuses this document or command; trying the same again is no use at once.
    Rejected,
    /// A mistake in set-up or in us.
    Fatal,
}

/// A failed operation.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What to do.
    pub class: Class,
    /// The server's code, if it answered.
    pub code: Option<i32>,
    /// Whether the server answered, so that the operation is over and can't land later (R4).
    pub answered: bool,
    /// The database that failed, where it is known; nothing said, it is the remote.
    pub side: Option<Side>,
    /// The server's name of the code or the kind of error; never values of documents (R23).
    pub what: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.class {
            Class::Offline(reason) if self.side == Some(Side::Local) => {
                f.write_str(reason.message_of_local())
            }
            Class::Offline(reason) => f.write_str(reason.message()),
            _ => match self.code {
                Some(PAUSED | STANDBY) | None => f.write_str(&self.what),
                Some(code) => write!(f, "{} (code {code})", self.what),
            },
        }
    }
}

impl std::error::Error for Failure {}

impl Failure {
    /// The deadline passed without an answer.
    pub fn timeout() -> Self {
        Self {
            class: Class::Offline(Reason::Timeout),
            code: None,
            answered: false,
            side: None,
            what: "no answer in time".into(),
        }
    }

    /// The side is not connected (yet).
    pub fn offline(reason: Reason) -> Self {
        Self {
            class: Class::Offline(reason),
            code: None,
            answered: false,
            side: None,
            what: reason.name().into(),
        }
    }

    /// Somebody said `pause` while work was going on.
    pub fn paused() -> Self {
        Self {
            class: Class::Transient,
            code: Some(PAUSED),
            answered: true,
            side: None,
            what: "paused meanwhile; `sangam resume` goes on".into(),
        }
    }

    /// Another daemon holds the lease, so nothing was sent.
    pub fn standby() -> Self {
        Self {
            class: Class::Transient,
            code: Some(STANDBY),
            answered: true,
            side: None,
            what:
                "this daemon stands by: another one holds the lease, or nobody does at the moment"
                    .into(),
        }
    }

    /// Something of ours went wrong.
    pub fn fatal(what: impl Into<String>) -> Self {
        Self {
            class: Class::Fatal,
            code: None,
            answered: true,
            side: None,
            what: what.into(),
        }
    }

    /// The server's answer by code.
    pub fn from_code(code: i32, name: &str) -> Self {
        Self {
            class: class_of_code(code),
            code: Some(code),
            answered: true,
            side: None,
            what: name.to_owned(),
        }
    }

    /// The same, of that database.
    pub fn of(self, side: Side) -> Self {
        Self {
            side: Some(side),
            ..self
        }
    }

    /// Whether the side can't be reached.
    pub fn is_offline(&self) -> bool {
        matches!(self.class, Class::Offline(_))
    }

    /// Whether the server won't do this command for us, now or later: not known to it, not offered on
    /// this tier, or not allowed to this user. Whoever has another way takes it.
    pub fn is_refusal(&self) -> bool {
        self.class == Class::Rejected || self.code == Some(UNAUTHORIZED)
    }
}

/// Our own, beside the server's: told to pause.
pub const PAUSED: i32 = -1;

/// Our own, too: another daemon may write, this one may not.
pub const STANDBY: i32 = -2;

/// The server's `Unauthorized`.
pub const UNAUTHORIZED: i32 = 13;

/// The server's `MaxTimeMSExpired`.
pub const MAX_TIME_EXPIRED: i32 = 50;

/// The table. Codes are those of the server's `error_codes.yml`.
pub fn class_of_code(code: i32) -> Class {
    match code {
        18 => Class::Offline(Reason::BadCredentials),
        // Atlas answers 8000 for whatever its proxy refuses; on an open connection that is the quota.
        8000 => Class::Offline(Reason::PausedOrOverQuota),
        // HostUnreachable, HostNotFound, NetworkTimeout, ShutdownInProgress, PrimarySteppedDown,
        // NotWritablePrimary, InterruptedAtShutdown, InterruptedDueToReplStateChange,
        // NotPrimaryNoSecondaryOk, NotPrimaryOrSecondary, SocketException, MaxTimeMSExpired,
        // ExceededTimeLimit, WriteConflict, LockTimeout, NoSuchTransaction, WriteConcernTimeout, CursorNotFound,
        // ReadConcernMajorityNotAvailableYet, SnapshotUnavailable, Interrupted.
        // Unauthorized is a matter of set-up, not of the document: tried again until it is put right.
        UNAUTHORIZED | 6 | 7 | 89 | 91 | 189 | 10107 | 11600 | 11602 | 13435 | 13436 | 9001
        | 50 | 262 | 112 | 24 | 251 | 64 | 43 | 134 | 246 | 11601 => Class::Transient,
        // ChangeStreamHistoryLost, CappedPositionLost, InvalidResumeToken
        286 | 136 | 260 => Class::HistoryLost,
        // $changeStream is only supported on replica sets.
        40573 => Class::Offline(Reason::NotAReplicaSet),
        _ => Class::Rejected,
    }
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let network = |reason, what: &str| Self {
            class: Class::Offline(reason),
            code: None,
            answered: false,
            side: None,
            what: what.to_owned(),
        };
        match error.kind.as_ref() {
            ErrorKind::Command(e) => Self::from_code(e.code, &e.code_name),
            ErrorKind::Authentication { .. } => Self {
                answered: true,
                ..network(Reason::BadCredentials, "authentication")
            },
            ErrorKind::Io(e) => network(reason_of_io(e), "network"),
            ErrorKind::DnsResolve { .. } => network(Reason::Dns, "name resolution"),
            ErrorKind::ServerSelection { .. } => network(Reason::Timeout, "no server to be had"),
            ErrorKind::ConnectionPoolCleared { .. } => network(Reason::Offline, "connection lost"),
            ErrorKind::InvalidTlsConfig { .. } => network(Reason::Tls, "TLS settings"),
            ErrorKind::Shutdown => network(Reason::Offline, "shut down"),
            _ if error.contains_label(mongodb::error::TRANSIENT_TRANSACTION_ERROR) => Self {
                class: Class::Transient,
                code: None,
                answered: false,
                side: None,
                what: "transaction interrupted".into(),
            },
            ErrorKind::InvalidArgument { .. } => Self::fatal("invalid argument"),
            ErrorKind::InvalidResponse { .. } => Self::fatal("invalid response"),
            _ => Self::fatal("driver error"),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

/// The reason behind a system error.
pub fn reason_of_io(e: &std::io::Error) -> Reason {
    use std::io::ErrorKind as K;
    match e.kind() {
        K::ConnectionRefused => Reason::Refused,
        K::TimedOut | K::HostUnreachable | K::NetworkUnreachable | K::NetworkDown => {
            Reason::Timeout
        }
        // rustls reports a failed handshake as invalid data.
        K::InvalidData => Reason::Tls,
        // The resolver's failures have no kind of their own: theirs is a nameless one, without a
        // number of the system.
        kind if e.raw_os_error().is_none() && format!("{kind:?}") == "Uncategorized" => Reason::Dns,
        _ => Reason::Offline,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_cant_be_resolved_is_told_from_a_broken_connection() {
        use std::net::ToSocketAddrs;
        let error = ("nowhere.invalid", 27017).to_socket_addrs().unwrap_err();
        assert_eq!(reason_of_io(&error), Reason::Dns);
        let error = std::io::Error::from_raw_os_error(104);
        assert_eq!(reason_of_io(&error), Reason::Offline);
        let error = std::io::Error::other("closed");
        assert_eq!(reason_of_io(&error), Reason::Offline);
    }

    #[test]
    fn the_side_that_failed_is_the_one_that_is_named() {
        for reason in [
            Reason::Offline,
            Reason::Dns,
            Reason::Refused,
            Reason::Timeout,
            Reason::Tls,
            Reason::BadCredentials,
        ] {
            let local = Failure::offline(reason).of(Side::Local).to_string();
            assert!(
                local.contains("local") && !local.contains("remote"),
                "{local}"
            );
            let remote = Failure::offline(reason).of(Side::Remote).to_string();
            assert!(!remote.contains("local"), "{remote}");
        }
    }

    #[test]
    fn lost_history_is_told_from_an_election() {
        assert_eq!(class_of_code(286), Class::HistoryLost);
        assert_eq!(class_of_code(136), Class::HistoryLost);
        assert_eq!(class_of_code(10107), Class::Transient);
        assert_eq!(class_of_code(121), Class::Rejected);
        assert_eq!(class_of_code(18), Class::Offline(Reason::BadCredentials));
    }
}

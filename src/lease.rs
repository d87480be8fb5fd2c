//! The lease: of several daemons on one pair of databases, exactly one writes.
//!
//! It is a document in the local database. Who holds it renews it; whoever stands by takes it when it
//! has stood still for ten seconds by the standby's own clock. No clocks of two machines are ever
//! compared. A holder that could not renew for five seconds counts itself out.
//!
//! That alone would not stop a holder that was suspended between its look at the clock and its write,
//! nor a command that a slow link delivers late. So there is a fence on each side, kept by that side's
//! server: every statement carries the time, by that server's clock, up to which it may begin
//! ([`Endpoint::fence`](crate::side::Endpoint::fence)), and transactions touch a document that the next
//! holder takes over first ([`Lease::fence_statement`]). What was promised as the last such time is in
//! the lease document before any command carries it, and the next holder waits for it to pass.
//!
//! Whoever stands by does all but write: it captures, follows and settles what is equal, so that it has
//! a queue and a base of its own when it takes over. What it can't see for itself the holder puts down
//! in the `journal`.

mod document;
mod entry;
mod heir;
pub(crate) mod journal;
mod keeper;

use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Mutex, Weak};
use std::time::Duration;

use bson::RawDocument;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::decide::Side;
use crate::failpoint::Failpoints;
use crate::failure::Failure;
use crate::raw::Writer;
use crate::shared::lock;
use crate::side::Endpoint;

pub(crate) use entry::Entry;
pub(crate) use journal::Journal;
pub(crate) use keeper::{adopt_sides, hand_over, run};

/// The collection with lease, fence and legacy, in the first database of both sides.
pub const COLLECTION: &str = "sangam_lease";

/// Time between renewals.
const RENEW: Duration = Duration::from_millis(1500);

/// So long after a renewal a write may begin.
const VALID: i64 = 5_000;

/// So long a write that began in time may be at work: the server ends it then.
pub(crate) const AT_WORK: Duration = Duration::from_secs(3);

/// A lease that stands still for so long is free to be taken: well above [`VALID`] and [`AT_WORK`]
/// together, for clocks of servers of one set that differ a little.
const SILENCE: i64 = 10_000;

/// After an outage of the local database its holder comes first.
const GRACE: i64 = 2_000;

/// How long a remote that is hard to reach may take to get a command, at most.
const LONGEST_ALLOWANCE: i64 = 20 * 60_000;

/// `ha` in the status.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Standing {
    /// `holder` (it works), `taking_over` (it will in a moment) or `standby`.
    pub role: String,
    /// Name of this daemon.
    pub name: String,
    /// Name of the one that holds the lease; `None` while nobody does, as far as is known.
    pub holder: Option<String>,
    /// Since when it holds the lease, by the local server's clock.
    pub since: Option<DateTime<Utc>>,
}

/// What a term of holding the lease is about.
#[derive(Clone, Debug)]
struct Term {
    epoch: i64,
    /// By the local server's clock, ms since 1970.
    since: i64,
    /// A write may begin until then, by [`clock`].
    valid_until: i64,
    /// What was promised: no command of ours begins on that side after it, ms since 1970 by its clock.
    until: [Option<i64>; 2],
    /// Sides on which the last holder's time is over and the fence is ours.
    open: [bool; 2],
    /// Nobody held the lease since we did.
    unbroken: bool,
    /// The last holder may have commands at work on the remote until then, by its clock.
    remote_busy_until: i64,
}

#[derive(Debug, Default)]
struct State {
    term: Option<Term>,
    /// Who holds it as last read, and since when (ms).
    holder: Option<(String, i64)>,
    /// A clock of the remote, ms since 1970, and [`clock`] when it was read.
    remote_clock: Option<(i64, i64)>,
    /// No new write begins: we are leaving.
    leaving: bool,
    /// Commands without an answer may still begin until then, by the side's clock.
    lost: [i64; 2],
}

impl State {
    fn may_write(&self, side: Side) -> bool {
        let now = clock();
        let Some(term) = self.term.as_ref().filter(|t| now < t.valid_until) else {
            return false;
        };
        // A promise for the remote has to be on record before it can be kept.
        let promised = match (side, self.remote_clock, term.until[1]) {
            (Side::Local, _, _) => true,
            (Side::Remote, Some((time, at)), Some(until)) => time + now - at < until,
            _ => false,
        };
        term.open[side as usize] && promised && !self.leaving
    }
}

/// What this daemon knows of the lease. The gate through which every write to either side goes.
#[derive(Debug)]
pub struct Lease {
    /// This daemon's state, by which it knows itself again after a restart.
    me: String,
    name: String,
    /// What the lease is about: site and databases.
    pair: String,
    db: String,
    local: Weak<Endpoint>,
    state: Mutex<State>,
    /// Writes on their way.
    at_work: AtomicUsize,
    /// How long the remote may take to get a command, in ms: more than [`VALID`] on a slow link.
    allowance: AtomicI64,
    journal: journal::Journal,
    failpoints: Failpoints,
    /// One transaction at a time on each side: all of them touch its fence.
    turns: [tokio::sync::Mutex<()>; 2],
}

/// A write on its way. Dropped without [`Pass::answered`], it may still happen.
#[derive(Debug)]
pub struct Pass<'a> {
    lease: &'a Lease,
    side: Side,
    answered: bool,
}

impl Pass<'_> {
    /// The server has answered: it is over.
    pub fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.answered {
            let mut state = lock(&self.lease.state);
            let until = state
                .term
                .as_ref()
                .and_then(|t| t.until[self.side as usize]);
            let lost = &mut state.lost[self.side as usize];
            *lost = (*lost).max(until.unwrap_or(0));
        }
        self.lease.at_work.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Milliseconds since the machine started, time in which it slept included.
fn clock() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec * 1000 + now.tv_nsec / 1_000_000
}

/// [`AT_WORK`] in ms.
fn at_work() -> i64 {
    i64::try_from(AT_WORK.as_millis()).unwrap_or(i64::MAX / 4)
}

impl Lease {
    /// Nothing is held yet. `me` names this daemon's state.
    pub fn new(config: &Config, me: String, local: Weak<Endpoint>) -> Self {
        Self {
            me,
            name: config.ha.name.clone(),
            pair: format!("{}:{}", config.site, config.databases.join(",")),
            db: config.databases[0].clone(),
            local,
            state: Mutex::default(),
            at_work: AtomicUsize::new(0),
            allowance: AtomicI64::new(VALID),
            journal: journal::Journal::default(),
            failpoints: Failpoints::from_env(),
            turns: Default::default(),
        }
    }

    /// Whether this daemon works: it holds the lease, and both sides are open to it.
    pub fn works(&self) -> bool {
        let state = lock(&self.state);
        state.may_write(Side::Local) && state.may_write(Side::Remote)
    }

    /// Whether a write to that side may begin.
    pub fn may_write(&self, side: Side) -> Result<(), Failure> {
        match lock(&self.state).may_write(side) {
            true => Ok(()),
            false => Err(Failure::standby()),
        }
    }

    /// Lets a write to that side begin, or not.
    pub fn begin(&self, side: Side) -> Result<Pass<'_>, Failure> {
        self.may_write(side)?;
        self.at_work.fetch_add(1, Ordering::AcqRel);
        if side == Side::Remote {
            self.failpoints.suspend("write_begun");
        }
        Ok(Pass {
            lease: self,
            side,
            answered: false,
        })
    }

    /// Up to when a statement for that side may begin, ms since 1970 by its server's clock. Never,
    /// while nothing may be written: what was built then must not be let through later.
    pub fn deadline(&self, side: Side) -> i64 {
        let state = lock(&self.state);
        if self.is_unfenced() {
            return i64::MAX / 2;
        }
        let term = state.term.as_ref();
        term.and_then(|t| t.until[side as usize]).unwrap_or(0)
    }

    /// The mutation `unfenced`: servers take whatever comes, however late.
    pub fn is_unfenced(&self) -> bool {
        self.failpoints.mutated("unfenced")
    }

    /// A statement came too late: the link is slower than thought.
    pub fn was_late(&self, side: Side) {
        if side == Side::Remote && self.works() {
            let longer = (self.allowance.load(Ordering::Relaxed) * 2).min(LONGEST_ALLOWANCE);
            self.allowance.store(longer, Ordering::Relaxed);
            tracing::debug!(longer, "the remote gets commands late");
        }
    }

    /// Waits for the turn of a transaction on that side.
    pub async fn turn(&self, side: Side) -> tokio::sync::MutexGuard<'_, ()> {
        self.turns[side as usize].lock().await
    }

    /// The last statement of every transaction: it finds the fence as this term left it and writes to
    /// it, so that transaction and take-over exclude each other on the server. Its database and itself.
    pub fn fence_statement(&self) -> (&str, Writer) {
        let state = lock(&self.state);
        let epoch = state.term.as_ref().map_or(-1, |t| t.epoch);
        (&self.db, document::touch_fence(self, epoch))
    }

    /// How things stand, for people.
    pub fn standing(&self) -> Standing {
        let state = lock(&self.state);
        let works = state.may_write(Side::Local);
        let held = state.term.as_ref().filter(|t| clock() < t.valid_until);
        let time = |ms: i64| DateTime::from_timestamp_millis(ms);
        match held {
            Some(term) => Standing {
                role: if works { "holder" } else { "taking_over" }.into(),
                name: self.name.clone(),
                holder: Some(self.name.clone()),
                since: time(term.since),
            },
            None => Standing {
                role: "standby".into(),
                name: self.name.clone(),
                holder: state.holder.as_ref().map(|h| h.0.clone()),
                since: state.holder.as_ref().and_then(|h| time(h.1)),
            },
        }
    }

    /// Why this daemon takes no orders, and who does.
    pub fn refusal(&self) -> String {
        let standing = self.standing();
        let since = standing.since.map_or(String::new(), |t| {
            format!(" since {}", t.format("%Y-%m-%d %H:%M:%S UTC"))
        });
        match standing.holder {
            Some(holder) if standing.role == "standby" => format!(
                "this daemon ({}) stands by; {holder} works{since}: tell that one",
                standing.name
            ),
            Some(_) => "this daemon is taking over; try again in a moment".into(),
            None => "this daemon stands by, and nobody works at the moment; try again in a moment"
                .into(),
        }
    }

    /// What this daemon puts down for the others.
    pub(crate) fn journal(&self) -> &journal::Journal {
        &self.journal
    }
}

/// Whether a command writes. The lease's own documents are not meant.
pub(crate) fn is_write(command: &RawDocument) -> bool {
    const WRITES: [&str; 9] = [
        "insert",
        "update",
        "delete",
        "findAndModify",
        "createIndexes",
        "create",
        "collMod",
        "drop",
        "dropIndexes",
    ];
    let Some(Ok((name, on))) = command.iter().next() else {
        return false;
    };
    WRITES.contains(&name.as_str()) && on.as_str() != Some(COLLECTION)
}

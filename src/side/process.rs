//! Whether the server that answers is still the process that we know, and the primary that we know.
//!
//! A server can only be put back to a backup while it does not run, so what follows is another
//! process, and each has an id, which heartbeats tell. When one is new, nothing is written to that
//! side and nothing read of it is believed until it was asked who it is (R12). A primary that is new
//! may know less than the one before for a moment, and is asked, too ([`super::recency`]).
//!
//! The driver gets in the way of that: it remembers the latest election that it has seen, and a server
//! put back to before it is no primary to it, for ever. So it is a new client that asks.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bson::Document;
use bson::oid::ObjectId;
use mongodb::Client;
use tokio::sync::Notify;

use super::Endpoint;
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::identity;
use crate::shared::{Shared, lock};

/// How long a server that can't be asked yet is left alone.
const AGAIN: Duration = Duration::from_millis(100);

/// How often it is looked whether the remote has a client by now, which is made when the link is there.
const LOOK: Duration = Duration::from_secs(1);

/// Most processes remembered of one address: a small Atlas tier has several behind one.
const MOST: usize = 64;

/// The processes of one side.
#[derive(Debug, Default)]
pub(super) struct Processes {
    /// By the server's address, oldest first.
    known: Mutex<HashMap<String, Vec<ObjectId>>>,
    /// The last election that was heard of.
    elected: Mutex<Option<ObjectId>>,
    /// How often a process was a new one.
    started: AtomicU64,
    /// How often a process or a primary was a new one, and how many of these were seen to.
    changed: AtomicU64,
    settled: AtomicU64,
    /// A process or a primary is new.
    news: Notify,
}

impl Processes {
    /// A heartbeat has come back.
    pub(super) fn met(&self, address: &str, reply: &Document) {
        let is_primary = ["isWritablePrimary", "ismaster"]
            .iter()
            .any(|name| reply.get_bool(name).unwrap_or(false));
        if is_primary && let Ok(election) = reply.get_object_id("electionId") {
            let last = lock(&self.elected).replace(election);
            if last.is_some_and(|last| last != election) {
                self.change();
            }
        }
        let version = reply.get_document("topologyVersion");
        let Ok(process) = version.and_then(|v| v.get_object_id("processId")) else {
            return;
        };
        let mut known = lock(&self.known);
        let known = known.entry(address.to_owned()).or_default();
        if known.contains(&process) {
            return;
        }
        if !known.is_empty() {
            self.started.fetch_add(1, Ordering::SeqCst);
            self.change();
        }
        known.push(process);
        if known.len() > MOST {
            known.remove(0);
        }
    }

    fn change(&self) {
        self.changed.fetch_add(1, Ordering::SeqCst);
        self.news.notify_one();
    }

    /// How many changes there were, if not all of them were seen to.
    fn unsettled(&self) -> Option<u64> {
        let changed = self.changed.load(Ordering::SeqCst);
        (changed != self.settled.load(Ordering::SeqCst)).then_some(changed)
    }
}

impl Endpoint {
    /// Refuses while a server has been started anew, or elected, and was not yet asked who it is.
    pub fn is_known(&self) -> Result<(), Failure> {
        match self.processes.unsettled() {
            None => Ok(()),
            Some(_) => Err(Failure {
                class: Class::Transient,
                ..Failure::fatal(format!(
                    "the {} database's server was started anew, or is a new primary, and is asked whether it is still the same database",
                    self.side.name()
                ))
            }
            .of(self.side)),
        }
    }

    fn renew(&self) -> Result<(), Failure> {
        let client = Client::with_options(self.options.clone()).map_err(Failure::from)?;
        *self.client.write().unwrap_or_else(PoisonError::into_inner) = client;
        Ok(())
    }

    /// Asks servers that were started anew who they are; only an answer that ends the daemon is an error.
    async fn settle(self: &Arc<Self>, shared: &Shared, renewed: &mut u64) -> Result<(), Failure> {
        let Some(changed) = self.processes.unsettled() else {
            return Ok(());
        };
        let started = self.processes.started.load(Ordering::SeqCst);
        if *renewed != started {
            self.renew()?;
            *renewed = started;
        }
        match identity::check(shared, self).await {
            Ok(()) => self.processes.settled.store(changed, Ordering::SeqCst),
            Err(failure) if failure.class == Class::Fatal => return Err(failure),
            Err(failure) => {
                tracing::debug!(side = self.side.name(), %failure, "started anew or elected, and can't be asked yet");
            }
        }
        Ok(())
    }
}

/// Watches the processes of one side until the daemon ends.
pub async fn watch(shared: Arc<Shared>, side: Side) -> Result<(), Failure> {
    let mut renewed = 0;
    loop {
        let endpoint = shared.endpoint(side).ok();
        if let Some(endpoint) = &endpoint {
            endpoint.settle(&shared, &mut renewed).await?;
        }
        let change = async {
            match &endpoint {
                Some(endpoint) if endpoint.is_known().is_ok() => {
                    endpoint.processes.news.notified().await;
                }
                Some(_) => tokio::time::sleep(AGAIN).await,
                None => tokio::time::sleep(LOOK).await,
            }
        };
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = change => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use bson::doc;

    use super::*;

    #[test]
    fn only_a_new_process_at_a_known_address_is_a_change() {
        let processes = Processes::default();
        let reply = |id| doc! {"topologyVersion": {"processId": id, "counter": 1_i64}};
        let (one, two) = (ObjectId::new(), ObjectId::new());
        processes.met("a", &reply(one));
        processes.met("b", &reply(two));
        processes.met("a", &reply(one));
        processes.met("a", &doc! {});
        assert_eq!(processes.unsettled(), None);
        for process in [two, one, two] {
            processes.met("a", &reply(process));
        }
        assert_eq!(processes.unsettled(), Some(1));
    }

    #[test]
    fn another_election_is_a_change() {
        let processes = Processes::default();
        let reply = |primary: bool, id| doc! {"isWritablePrimary": primary, "electionId": id};
        let (one, two) = (ObjectId::new(), ObjectId::new());
        for (primary, id) in [(true, one), (true, one), (false, two)] {
            processes.met("a", &reply(primary, id));
        }
        assert_eq!(processes.unsettled(), None);
        processes.met("b", &reply(true, two));
        assert_eq!(processes.unsettled(), Some(1));
        assert_eq!(processes.started.load(Ordering::SeqCst), 0);
    }
}

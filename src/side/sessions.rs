//! The sessions of transactions, and the end of those that a crash or a lost link left open.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bson::{Document, doc};
use mongodb::ClientSession;

use super::Endpoint;
use crate::failure::{Class, Failure};
use crate::settle::store_failed;
use crate::shared::lock;
use crate::store::Store;

/// A session whose transaction is under way.
pub struct OpenSession {
    /// The driver's session.
    pub session: ClientSession,
    name: String,
    /// Whether its transaction is known to be over.
    over: bool,
    all: Arc<Sessions>,
}

impl Drop for OpenSession {
    fn drop(&mut self) {
        lock(&self.all.at_work).remove(&self.name);
        if !self.over {
            self.all.left_open.store(true, Ordering::SeqCst);
        }
    }
}

/// The sessions of a side's transactions.
pub(super) struct Sessions {
    /// Names of those that are under way.
    at_work: Mutex<HashSet<String>>,
    /// Whether there may be others on record.
    left_open: AtomicBool,
}

impl Default for Sessions {
    /// An earlier run may have left some open.
    fn default() -> Self {
        Self {
            at_work: Mutex::default(),
            left_open: AtomicBool::new(true),
        }
    }
}

impl Endpoint {
    /// Starts a session for a transaction. It is on record until [`Endpoint::end_session`]: a
    /// transaction that a crash leaves open would lock its documents for a minute.
    pub async fn session(&self) -> Result<OpenSession, Failure> {
        self.is_known()?;
        let session = self.client().start_session().await;
        let session = session.map_err(|e| self.failure(&e))?;
        let id = session
            .id()
            .to_vec()
            .map_err(|_| Failure::fatal("session id"))?;
        let hash = xxhash_rust::xxh3::xxh3_64(&id);
        let name = format!("session:{}:{hash:016x}", self.side.name());
        lock(&self.sessions.at_work).insert(name.clone());
        let open = OpenSession {
            session,
            name: name.clone(),
            over: false,
            all: self.sessions.clone(),
        };
        if let Some(store) = self.journal.get() {
            store.set_meta(&name, id).await.map_err(store_failed)?;
        }
        Ok(open)
    }

    /// The session's transaction is over, one way or the other.
    pub async fn end_session(&self, session: &mut OpenSession) -> Result<(), Failure> {
        session.over = true;
        let Some(store) = self.journal.get() else {
            return Ok(());
        };
        let name = session.name.clone();
        let ended = store.call(move |c| c.execute("DELETE FROM meta WHERE k = ?", [name]));
        ended.await.map(|_| ()).map_err(store_failed)
    }

    /// Ends the transactions that an earlier run or a lost link left open on this side: until the server
    /// itself gives them up, which takes it a minute, their documents are locked.
    pub async fn end_leftovers(&self) -> Result<(), Failure> {
        let Some(store) = self.journal.get() else {
            return Ok(());
        };
        if !self.sessions.left_open.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let ended = self.end_noted(store).await;
        if ended.is_err() {
            self.sessions.left_open.store(true, Ordering::SeqCst);
        }
        ended
    }

    async fn end_noted(&self, store: &Store) -> Result<(), Failure> {
        let prefix = format!("session:{}:%", self.side.name());
        let noted = store.call(move |c| {
            c.prepare("SELECT k, v FROM meta WHERE k LIKE ?")?
                .query_map([prefix], |r| Ok((r.get(0)?, r.get(1)?)))?
                .collect::<Result<Vec<(String, Vec<u8>)>, _>>()
        });
        let mut noted = noted.await.map_err(store_failed)?;
        // Those that other batches are at work with are no leftovers.
        let at_work = lock(&self.sessions.at_work).clone();
        noted.retain(|(name, _)| !at_work.contains(name));
        if noted.is_empty() {
            return Ok(());
        }
        let ids: Vec<Document> = noted
            .iter()
            .filter_map(|(_, id)| Document::from_reader(id.as_slice()).ok())
            .collect();
        match self.run_doc("admin", doc! {"killSessions": ids}).await {
            Err(failure) if failure.is_offline() || failure.class == Class::Transient => {
                return Err(failure);
            }
            // A small tier may not allow it; then the server's own limit of a minute ends them.
            Err(failure) => tracing::debug!(%failure, "ending old sessions"),
            Ok(_) => {}
        }
        let forgotten = store.call(move |c| {
            let mut forget = c.prepare_cached("DELETE FROM meta WHERE k = ?")?;
            noted
                .iter()
                .try_for_each(|(name, _)| forget.execute([name]).map(drop))
        });
        forgotten.await.map_err(store_failed)
    }
}

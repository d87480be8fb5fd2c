//! Rulings: a resolution on its way into both databases, durable before its first write (R3).
//!
//! A ruling holds the plan's writes and the record of who decided what. Its documents are in
//! `Shared::busy` for as long as it is at work, so that the worker keeps off, also over a crash or a
//! lost answer: then it is taken up again, and each write is asked for first: is it there already?
//! It ends in one transaction that closes the conflict, or it is dropped and the conflict stays open.

mod kept;

use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;

use crate::batch::landed;
use crate::content::strip;
use crate::decide::Side;
use crate::failure::{Class, Failure};
use crate::guard::{self, Duplicate, Form, Verdict, Write};
use crate::key::{Id, Key};
use crate::lease::{Entry, journal};
use crate::resolution::Step;
use crate::settle::store_failed;
use crate::shared::{Settings, Shared, lock};
use crate::store::base;
use crate::store::intents::{self, Intent};
use crate::store::queue::{self, Change};
use crate::store::{StoreError, records};
use kept::{all, forget, get, put};

/// A resolution that is being carried out.
#[derive(Clone, Debug, PartialEq)]
pub struct Ruling {
    /// The conflict it settles (or the record that it undoes).
    pub id: [u8; 12],
    /// Its writes.
    pub steps: Vec<Step>,
    /// The next one.
    pub at: usize,
    /// Documents that the worker looks at afterwards; the worker keeps off them until then.
    pub look: Vec<(Key, Id)>,
    /// Records that tell of it: id, fields to set.
    pub records: Vec<([u8; 12], Vec<u8>)>,
    /// Run of the daemon that last wrote for it.
    pub epoch: i64,
}

/// How far it came.
#[derive(Debug)]
pub enum Ending {
    /// All is written and on record.
    Done,
    /// A document is not what was expected. What was written before stays.
    Changed,
    /// A unique value is taken.
    Taken(Box<Duplicate>),
    /// The server refuses the document.
    Refused(String),
    /// The answer was lost: it is taken up again when the link is back.
    Pending(Failure),
}

/// Documents that nobody else works on until this is dropped.
pub struct Taken {
    shared: Arc<Shared>,
    keys: Vec<Key>,
}

impl Taken {
    /// Waits for the worker to let go of all of them; `None` when it does not for a while.
    pub async fn take(shared: &Arc<Shared>, keys: &[Key]) -> Option<Self> {
        let mut keys = keys.to_vec();
        keys.sort();
        keys.dedup();
        for _ in 0..1500 {
            {
                let mut busy = lock(&shared.busy);
                if !keys.iter().any(|k| busy.contains(k)) {
                    busy.extend(keys.iter().cloned());
                    return Some(Self {
                        shared: shared.clone(),
                        keys,
                    });
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        None
    }

    /// Keeps them taken for a ruling that is to be taken up again.
    fn keep(mut self, id: [u8; 12]) {
        lock(&self.shared.rulings).push(id);
        self.keys.clear();
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.shared.touched.note(&self.keys);
        {
            let mut busy = lock(&self.shared.busy);
            for key in &self.keys {
                busy.remove(key);
            }
        }
        self.shared.wake.notify_one();
        self.shared.stamp.notify_one();
    }
}

/// Takes the documents of unfinished rulings out of the worker's reach, before it starts.
pub async fn load(shared: &Shared) -> Result<(), StoreError> {
    for ruling in shared.store.call(all).await? {
        lock(&shared.busy).extend(ruling.look.iter().map(|(key, _)| key.clone()));
        lock(&shared.rulings).push(ruling.id);
    }
    Ok(())
}

/// Takes up what was left unfinished; runs until the daemon ends.
pub async fn run(shared: Arc<Shared>) -> Result<(), Failure> {
    loop {
        tokio::select! {
            () = shared.cancel.cancelled() => return Ok(()),
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
        }
        if !shared.link.is_online() || shared.remote().is_none() || shared.withholds() {
            continue;
        }
        let waiting: Vec<[u8; 12]> = lock(&shared.rulings).drain(..).collect();
        for id in waiting {
            let found = shared.store.call(move |c| get(c, &id));
            let Some(mut ruling) = found.await.map_err(store_failed)? else {
                continue;
            };
            let taken = Taken {
                shared: shared.clone(),
                keys: ruling.look.iter().map(|(key, _)| key.clone()).collect(),
            };
            let outcome = take_up(&shared, &mut ruling).await;
            match end(&shared, &ruling, outcome, taken).await? {
                Ending::Pending(failure) => {
                    tracing::debug!(%failure, "a resolution waits for the link")
                }
                Ending::Done => tracing::info!("a resolution that was interrupted is finished"),
                ending => tracing::warn!(
                    ?ending,
                    "a resolution that was interrupted could not be finished; its conflict is open again"
                ),
            }
        }
    }
}

/// Stores a ruling and carries it out.
pub async fn begin(
    shared: &Arc<Shared>,
    mut ruling: Ruling,
    taken: Taken,
) -> Result<Ending, Failure> {
    ruling.epoch = shared.store.epoch();
    let copy = ruling.clone();
    shared
        .store
        .call(move |c| put(c, &copy))
        .await
        .map_err(store_failed)?;
    shared.failpoints.crash("ruling_stored");
    let outcome = carry_on(shared, &mut ruling).await;
    end(shared, &ruling, outcome, taken).await
}

async fn take_up(shared: &Arc<Shared>, ruling: &mut Ruling) -> Result<Ending, Failure> {
    let settings = shared.settings();
    if let Some(step) = ruling.steps.get(ruling.at).cloned() {
        let form = guard::form(&write_of(&step), &settings.sync_fields);
        let intent = intent_of(&step, &form, (ruling.epoch, &settings));
        let there = read(shared, &settings, &step).await?;
        if landed(&intent, there.as_deref()) {
            step_done(shared, ruling).await?;
        } else if let Some(until) = shared.late_until(&step.key, &intent) {
            // It may still land (R4).
            tokio::time::sleep(until.saturating_duration_since(std::time::Instant::now())).await;
            return Ok(Ending::Pending(Failure::timeout()));
        } else if there != step.expect {
            return Ok(Ending::Changed);
        } else {
            ruling.epoch = shared.store.epoch();
        }
    }
    carry_on(shared, ruling).await
}

/// Writes from `ruling.at` on.
async fn carry_on(shared: &Arc<Shared>, ruling: &mut Ruling) -> Result<Ending, Failure> {
    let settings = shared.settings();
    while let Some(step) = ruling.steps.get(ruling.at).cloned() {
        let write = write_of(&step);
        let form = guard::form(&write, &settings.sync_fields);
        let intent = intent_of(&step, &form, (ruling.epoch, &settings));
        let (key, kept, wanted) = (step.key.clone(), ruling.clone(), intent.clone());
        let base = shared
            .store
            .call(move |c| {
                put(c, &kept)?;
                intents::put(c, &key, &wanted)?;
                base::get(c, &key)
            })
            .await
            .map_err(store_failed)?;
        let entry = Entry::of(step.id.clone(), base, intent);
        if let Err(failure) = journal::announce(shared, vec![(step.key.clone(), entry)]).await {
            return Ok(Ending::Pending(failure));
        }
        let (verdict, failure) = send(shared, &settings, &step, (write, form)).await?;
        shared.failpoints.crash("ruling_written");
        match verdict {
            Verdict::Done => step_done(shared, ruling).await?,
            Verdict::Modified => return Ok(Ending::Changed),
            Verdict::Duplicate(dup) => return Ok(Ending::Taken(dup)),
            Verdict::Rejected { message, .. } => return Ok(Ending::Refused(message)),
            Verdict::Unknown { late } => {
                if late {
                    shared.set_late(&step.key);
                }
                if !late && failure.is_none() {
                    // Answered, but not which way (a deletion that found nothing): look.
                    let there = read(shared, &settings, &step).await?;
                    if there == step.new {
                        step_done(shared, ruling).await?;
                        continue;
                    }
                    return Ok(Ending::Changed);
                }
                return Ok(Ending::Pending(failure.unwrap_or_else(Failure::timeout)));
            }
        }
    }
    Ok(Ending::Done)
}

async fn send(
    shared: &Arc<Shared>,
    settings: &Settings,
    step: &Step,
    write: (Write, Form),
) -> Result<(Verdict, Option<Failure>), Failure> {
    let Some((db, coll)) = shared.store.namespace_name(step.key.ns()) else {
        return Ok((Verdict::Modified, None));
    };
    let endpoint = shared.endpoint(step.side)?;
    let stamp = shared
        .stamp_for(settings, step.side)
        .filter(|_| step.from_other);
    let outcome = guard::write(
        &endpoint,
        (&db, &coll),
        &[(&write.0, &write.1)],
        &settings.sync_fields,
        stamp,
    )
    .await;
    let failure = outcome.failure;
    shared.note(step.side, &failure.clone().map_or(Ok(()), Err));
    let verdict = outcome.verdicts.into_iter().next();
    Ok((verdict.unwrap_or(Verdict::Unknown { late: false }), failure))
}

async fn read(
    shared: &Arc<Shared>,
    settings: &Settings,
    step: &Step,
) -> Result<Option<Vec<u8>>, Failure> {
    let Some((db, coll)) = shared.store.namespace_name(step.key.ns()) else {
        return Ok(None);
    };
    let endpoint = shared.endpoint(step.side)?;
    let ids = std::iter::once(&step.id);
    let found = endpoint.read(&db, &coll, step.key.ns(), ids).await;
    shared.note(step.side, &found);
    let found = found?.remove(&step.key);
    Ok(found.map(|d| strip(&d, &settings.sync_fields).into_owned()))
}

async fn step_done(shared: &Arc<Shared>, ruling: &mut Ruling) -> Result<(), Failure> {
    let step = ruling.steps[ruling.at].clone();
    let key = step.key.clone();
    ruling.at += 1;
    let kept = ruling.clone();
    if let Some((db, coll)) = shared.store.namespace_name(step.key.ns()) {
        let shown = shared.settings().display(&db, &coll);
        let bytes = step.new.as_ref().map_or(0, Vec::len);
        shared.runs.moved(step.side, &shown, 1, bytes);
    }
    shared
        .store
        .call(move |c| {
            base::put(c, &step.key, step.base_after.as_deref())?;
            intents::forget(c, &step.key)?;
            put(c, &kept)
        })
        .await
        .map_err(store_failed)?;
    if let Some(lease) = shared.lease() {
        lease.journal().decided(&key, true);
    }
    Ok(())
}

/// Closes the books of a ruling, unless its outcome is open.
async fn end(
    shared: &Arc<Shared>,
    ruling: &Ruling,
    outcome: Result<Ending, Failure>,
    taken: Taken,
) -> Result<Ending, Failure> {
    let ending = match outcome {
        Ok(ending) => ending,
        Err(failure) if failure.class == Class::Fatal => return Err(failure),
        Err(failure) => Ending::Pending(failure),
    };
    let ruling = ruling.clone();
    match &ending {
        Ending::Pending(_) => taken.keep(ruling.id),
        Ending::Done => {
            shared
                .store
                .call(move |c| finish(c, &ruling))
                .await
                .map_err(store_failed)?;
            shared.failpoints.crash("ruling_done");
        }
        _ => {
            let look = ruling.at > 0 || matches!(ending, Ending::Changed);
            let given_up = ruling.steps.get(ruling.at).map(|step| step.key.clone());
            shared
                .store
                .call(move |c| give_up(c, &ruling, look))
                .await
                .map_err(store_failed)?;
            if let (Some(lease), Some(key)) = (shared.lease(), given_up) {
                lease.journal().decided(&key, false);
            }
        }
    }
    Ok(ending)
}

fn finish(c: &Connection, ruling: &Ruling) -> rusqlite::Result<()> {
    for (key, id) in &ruling.look {
        // Only this conflict: an undo may concern a document that waits for another one.
        if records::open_conflict(c, key)?.is_some_and(|open| open.id == ruling.id) {
            records::close_conflict(c, key)?;
        }
        records::put_stamp(c, key, id)?;
    }
    for (id, fields) in &ruling.records {
        records::put_record(c, "conflict_logs", id, fields)?;
    }
    forget(c, ruling)?;
    look_again(c, &ruling.look)
}

fn give_up(c: &Connection, ruling: &Ruling, look: bool) -> rusqlite::Result<()> {
    if let Some(step) = ruling.steps.get(ruling.at) {
        intents::forget(c, &step.key)?;
    }
    forget(c, ruling)?;
    if look {
        look_again(c, &ruling.look)?;
    }
    Ok(())
}

/// Lets the worker look at both sides of these documents.
pub fn look_again(c: &Connection, keys: &[(Key, Id)]) -> rusqlite::Result<()> {
    let changes: Vec<Change> = keys
        .iter()
        .map(|(key, id)| Change {
            key: key.clone(),
            id: id.clone(),
            hint: None,
        })
        .collect();
    let now = chrono::Utc::now().timestamp_millis();
    queue::enqueue(c, Side::Local, &changes, now)?;
    queue::enqueue(c, Side::Remote, &changes, now)
}

fn write_of(step: &Step) -> Write {
    Write {
        key: step.key.clone(),
        id: step.id.clone(),
        expect: step.expect.clone(),
        new: step.new.clone(),
    }
}

/// `updatedAt` does not tell whether a write landed: whoever edits the document afterwards bumps it.
fn intent_of(step: &Step, form: &Form, (epoch, settings): (i64, &Settings)) -> Intent {
    let updated_at = settings.config.fields.updated_at.as_bytes();
    let telling = |names: &[Vec<u8>]| {
        let names = names.iter().filter(|n| *n != updated_at).cloned();
        Some(names.collect::<Vec<_>>()).filter(|names| !names.is_empty())
    };
    Intent {
        digest: None,
        side: step.side,
        new: step.new.clone(),
        base_after: step.base_after.clone(),
        fields: form.fields().and_then(telling),
        epoch,
        receipt: None,
    }
}

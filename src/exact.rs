//! Writes in a transaction: exact ones for odd documents, and the untying of unique values.

use bson::RawDocumentBuf;
use mongodb::ClientSession;

use crate::content;
use crate::failure::{Class, Failure};
use crate::guard::{self, Form, Stamp, Verdict, Write};
use crate::lease::Lease;
use crate::raw::Writer;
use crate::receipt::Receipt;
use crate::side::{Endpoint, deadline};

/// Reads, compares bytes, writes, commits: a compare-and-set for what no pipeline can carry.
pub async fn write(
    endpoint: &Endpoint,
    ns: (&str, &str),
    write: &Write,
    sync_fields: &[String],
    stamp: Option<Stamp<'_>>,
) -> (Verdict, Option<Failure>) {
    let with = With {
        sync_fields,
        stamp,
        receipt: None,
    };
    write_together(endpoint, &[(ns, write)], with).await
}

/// What goes with the documents of a transaction.
#[derive(Clone, Copy)]
pub struct With<'a> {
    /// Names of the sync fields.
    pub sync_fields: &'a [String],
    /// Those that go with a content.
    pub stamp: Option<Stamp<'a>>,
    /// The database of the receipts, and the one that it leaves there.
    pub receipt: Option<(&'a str, Receipt)>,
}

/// Carries out all the writes in one transaction, or none. Every document is removed and put back, so
/// that unique values can change hands (R16). The verdict is that of the whole.
pub async fn write_together(
    endpoint: &Endpoint,
    writes: &[((&str, &str), &Write)],
    with: With<'_>,
) -> (Verdict, Option<Failure>) {
    let bytes = writes.iter().map(|(_, w)| size(w)).sum();
    carry_out(endpoint, Writes::Exact(writes), bytes, with).await
}

/// Writes to one collection each, in the forms of [`guard::form`].
pub type ByCollection<'a> = [((&'a str, &'a str), Vec<(&'a Write, &'a Form)>)];

/// Carries out guarded writes to several collections in one transaction, or none. The verdict is that of
/// the whole; none of the forms may be `Exact`.
pub async fn write_guarded(
    endpoint: &Endpoint,
    writes: &ByCollection<'_>,
    with: With<'_>,
) -> (Verdict, Option<Failure>) {
    let all = writes.iter().flat_map(|(_, writes)| writes);
    let bytes = all.map(|(w, _)| size(w)).sum();
    carry_out(endpoint, Writes::Guarded(writes), bytes, with).await
}

fn size(write: &Write) -> usize {
    let len = |d: &Option<Vec<u8>>| d.as_ref().map_or(0, Vec::len);
    len(&write.expect) + len(&write.new)
}

/// What a transaction does.
#[derive(Clone, Copy)]
enum Writes<'a> {
    /// Reads, compares bytes, removes and puts back.
    Exact(&'a [((&'a str, &'a str), &'a Write)]),
    /// Guarded statements.
    Guarded(&'a ByCollection<'a>),
}

async fn carry_out(
    endpoint: &Endpoint,
    writes: Writes<'_>,
    bytes: usize,
    with: With<'_>,
) -> (Verdict, Option<Failure>) {
    // A transaction reads and writes each document whole; the server itself ends it after a minute.
    let attempt = tokio::time::timeout(deadline(bytes) * 2, attempt(endpoint, writes, with));
    let Ok(outcome) = attempt.await else {
        return (Verdict::Unknown { late: true }, Some(Failure::timeout()));
    };
    match outcome {
        Ok(verdict) => (verdict, None),
        Err((failure, committing)) => {
            let late = committing && !failure.answered;
            let verdict = match failure.class {
                Class::Rejected => Verdict::Rejected {
                    code: failure.code.unwrap_or(0),
                    message: failure.what.clone(),
                },
                _ => Verdict::Unknown { late },
            };
            (verdict, Some(failure))
        }
    }
}

/// The failure tells whether the commit was under way.
async fn attempt(
    endpoint: &Endpoint,
    writes: Writes<'_>,
    with: With<'_>,
) -> Result<Verdict, (Failure, bool)> {
    let before = |f: Failure| (f, false);
    let lease = endpoint.lease.get();
    let pass = lease.map(|l| l.begin(endpoint.side)).transpose();
    let pass = pass.map_err(before)?;
    let _turn = match lease {
        Some(lease) => Some(lease.turn(endpoint.side).await),
        None => None,
    };
    endpoint.end_leftovers().await.map_err(before)?;
    let mut open = endpoint.session().await.map_err(before)?;
    let outcome = transact(endpoint, &mut open.session, writes, with).await;
    // Unanswered, it may still be open: the record stays until `end_leftovers`.
    let over = outcome.as_ref().err().is_none_or(|(f, _)| f.answered);
    if over {
        if let Some(pass) = pass {
            pass.answered();
        }
        endpoint.end_session(&mut open).await.map_err(before)?;
    }
    outcome
}

async fn transact(
    endpoint: &Endpoint,
    session: &mut ClientSession,
    writes: Writes<'_>,
    with: With<'_>,
) -> Result<Verdict, (Failure, bool)> {
    let before = |f: Failure| (f, false);
    session
        .start_transaction()
        .write_concern(mongodb::options::WriteConcern::majority())
        .read_concern(mongodb::options::ReadConcern::snapshot())
        .await
        .map_err(|e| before(endpoint.failure(&e)))?;
    let outcome = match writes {
        Writes::Exact(writes) => statements(endpoint, session, writes, with).await,
        Writes::Guarded(writes) => guarded(endpoint, session, writes, with).await,
    };
    let outcome = match (outcome, with.receipt) {
        (Ok(Verdict::Done), Some((db, receipt))) => {
            // It is put there even if somebody removed the lane meanwhile.
            let left = run(endpoint, session, db, receipt.statement()).await;
            left.map(|refused| refused.unwrap_or(Verdict::Done))
        }
        (outcome, _) => outcome,
    };
    let outcome = match (outcome, endpoint.lease.get()) {
        (Ok(Verdict::Done), Some(lease)) => fence(endpoint, session, lease).await,
        (outcome, _) => outcome,
    };
    match outcome {
        Ok(Verdict::Done) => {}
        Ok(verdict) => {
            abort(session).await;
            return Ok(verdict);
        }
        Err(failure) => {
            abort(session).await;
            return Err(before(failure));
        }
    }
    session
        .commit_transaction()
        .await
        .map_err(|e| (endpoint.failure(&e), true))?;
    Ok(Verdict::Done)
}

/// The last statement: as of now nobody else has taken over, and until the commit nobody can.
async fn fence(
    endpoint: &Endpoint,
    session: &mut ClientSession,
    lease: &Lease,
) -> Result<Verdict, Failure> {
    if lease.is_unfenced() {
        return Ok(Verdict::Done);
    }
    let (db, statement) = lease.fence_statement();
    match reply(endpoint, session, db, statement).await? {
        (None, 1) => Ok(Verdict::Done),
        _ => Err(Failure::standby()),
    }
}

/// The server drops an abandoned transaction by itself; this only does it sooner.
async fn abort(session: &mut ClientSession) {
    if let Err(error) = session.abort_transaction().await {
        tracing::debug!(error = %Failure::from(&error), "abort of a transaction");
    }
}

async fn statements(
    endpoint: &Endpoint,
    session: &mut ClientSession,
    writes: &[((&str, &str), &Write)],
    With {
        sync_fields, stamp, ..
    }: With<'_>,
) -> Result<Verdict, Failure> {
    for ((db, coll), write) in writes {
        let mut w = Writer::new();
        w.str("find", coll)
            .open("filter")
            .open("_id")
            .value("$eq", write.id.kind, &write.id.value)
            .close()
            .close();
        w.i32("limit", 1).bool("singleBatch", true);
        let database = session.client().database(db);
        let mut cursor = database
            .run_raw_cursor_command(w.command())
            .session(&mut *session)
            .await
            .map_err(|e| endpoint.failure(&e))?
            .with_type::<RawDocumentBuf>();
        let found = match cursor.next(session).await {
            Some(found) => Some(found.map_err(|e| endpoint.failure(&e))?),
            None => None,
        };
        let there = found
            .as_ref()
            .map(|d| content::strip(d.as_bytes(), sync_fields));
        if there.as_deref() != write.expect.as_deref() {
            return Ok(Verdict::Modified);
        }
        if found.is_some() {
            let mut w = Writer::new();
            w.str("delete", coll).open_array("deletes").open("0");
            w.open("q")
                .open("_id")
                .value("$eq", write.id.kind, &write.id.value)
                .close()
                .close()
                .i32("limit", 1);
            run(endpoint, session, db, w).await?;
        }
    }
    for ((db, coll), write) in writes {
        let Some(new) = &write.new else { continue };
        let mut w = Writer::new();
        if guard::form(
            &Write {
                expect: None,
                ..(*write).clone()
            },
            sync_fields,
        ) == guard::Form::Insert
        {
            w.str("insert", coll)
                .open_array("documents")
                .doc("0", &guard::stamped(new, stamp));
        } else {
            w.str("update", coll).open_array("updates").open("0");
            w.open("q")
                .open("_id")
                .value("$eq", write.id.kind, &write.id.value)
                .close()
                .close();
            w.open_array("u")
                .open("0")
                .open("$replaceWith")
                .doc("$literal", &guard::stamped(new, stamp));
            w.close().close().close().bool("upsert", true);
        }
        if let Some(verdict) = run(endpoint, session, db, w).await? {
            return Ok(verdict);
        }
    }
    Ok(Verdict::Done)
}

async fn guarded(
    endpoint: &Endpoint,
    session: &mut ClientSession,
    writes: &ByCollection<'_>,
    With {
        sync_fields, stamp, ..
    }: With<'_>,
) -> Result<Verdict, Failure> {
    for ((db, coll), writes) in writes {
        for (kind, w, count) in guard::commands(coll, writes, sync_fields, stamp) {
            let (verdict, n) = reply(endpoint, session, db, w).await?;
            if let Some(verdict) = verdict {
                return Ok(verdict);
            }
            // A deletion that found nothing as expected is no error (R8).
            if kind == guard::Kind::Delete && usize::try_from(n).unwrap_or(0) < count {
                return Ok(Verdict::Modified);
            }
        }
    }
    Ok(Verdict::Done)
}

/// Runs a write in the transaction; a write error comes back as its verdict.
async fn run(
    endpoint: &Endpoint,
    session: &mut ClientSession,
    db: &str,
    w: Writer,
) -> Result<Option<Verdict>, Failure> {
    Ok(reply(endpoint, session, db, w).await?.0)
}

/// The same, with the number of documents written.
async fn reply(
    endpoint: &Endpoint,
    session: &mut ClientSession,
    db: &str,
    w: Writer,
) -> Result<(Option<Verdict>, i32), Failure> {
    let reply = session
        .client()
        .database(db)
        .run_raw_command(w.command())
        .session(session)
        .await
        .map_err(|e| endpoint.failure(&e))?;
    let error = reply
        .get_array("writeErrors")
        .ok()
        .and_then(|a| a.first())
        .and_then(|e| e.as_document())
        .cloned();
    let n = reply.get_i32("n").unwrap_or(0);
    Ok((error.map(|e| guard::verdict_of(&e)), n))
}

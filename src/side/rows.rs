//! What a cursor answers: documents where they stand in the server's answer, not copied one by one.

use std::sync::Arc;
use std::time::Duration;

use bson::RawDocumentBuf;
use bytes::Bytes;
use futures::StreamExt as _;
use mongodb::error::Error;
use mongodb::raw_batch_cursor::{RawBatch, RawBatchCursor};

use super::Endpoint;
use crate::budget::SMALLEST;
use crate::failure::Failure;
use crate::raw;

/// Documents of a cursor.
pub struct Rows {
    endpoint: Arc<Endpoint>,
    cursor: RawBatchCursor,
    /// How long an answer takes usually, at most.
    usual: Duration,
    /// The last answer, from the next document on.
    answer: Answer,
}

impl Rows {
    pub(super) fn new(endpoint: Arc<Endpoint>, cursor: RawBatchCursor, usual: Duration) -> Self {
        Self {
            endpoint,
            cursor,
            usual,
            answer: Answer::default(),
        }
    }

    /// The next document, or `None` at the end.
    pub async fn next(&mut self) -> Result<Option<RawDocumentBuf>, Failure> {
        loop {
            if let Some(document) = self.answer.next() {
                let document = RawDocumentBuf::from_bytes(document?.into());
                return document.map(Some).map_err(|_| malformed());
            }
            match self.answer().await? {
                Some(answer) => self.answer = answer,
                None => return Ok(None),
            }
        }
    }

    /// The server's next answer, which may be an empty one, or `None` at the end.
    pub async fn answer(&mut self) -> Result<Option<Answer>, Failure> {
        let next = self.endpoint.within(self.usual, self.cursor.next()).await?;
        let failed = |e: Error| self.endpoint.failure(&e);
        let Some(batch) = next.transpose().map_err(failed)? else {
            return Ok(None);
        };
        let answer = Answer::new(batch).map_err(failed)?;
        if let Some(budget) = self.endpoint.budget.get() {
            // In pieces: whoever goes before us shall not wait until all of it is earned.
            let mut left = answer.documents.len();
            while left > 0 {
                let piece = left.min(SMALLEST);
                budget.pay(piece).await;
                left -= piece;
            }
        }
        Ok(Some(answer))
    }
}

/// Documents of one answer of a server, in order; each is a part of the answer's memory.
#[derive(Default)]
pub struct Answer {
    /// The array that holds them.
    documents: Bytes,
    /// Where the next one's element begins.
    at: usize,
}

/// The driver's answer as the owner of its memory.
struct Owner(RawBatch);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        self.0.as_raw_document().as_bytes()
    }
}

impl Answer {
    fn new(batch: RawBatch) -> mongodb::error::Result<Self> {
        let documents = batch.doc_slices()?.as_bytes();
        let begin =
            documents.as_ptr() as usize - batch.as_raw_document().as_bytes().as_ptr() as usize;
        let within = begin..begin + documents.len();
        Ok(Self {
            documents: Bytes::from_owner(Owner(batch)).slice(within),
            at: 4,
        })
    }
}

impl Iterator for Answer {
    type Item = Result<Bytes, Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.documents.is_empty() {
            return None;
        }
        let element = match raw::elements_from(&self.documents, self.at).next()? {
            Ok(e) if e.kind == raw::DOCUMENT => e,
            _ => {
                self.documents.clear();
                return Some(Err(malformed()));
            }
        };
        let end = self.at + element.whole.len();
        let begin = end - element.value.len();
        self.at = end;
        Some(Ok(self.documents.slice(begin..end)))
    }
}

fn malformed() -> Failure {
    Failure::fatal("the server's answer is no BSON")
}

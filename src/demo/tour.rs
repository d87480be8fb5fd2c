//! The tour: what is done to the two databases, and the proof that Sangam keeps them equal.
//!
//! Each chapter does something, waits until it can be seen in the databases themselves, and says
//! so with figures. What doesn't come true is an error, which ends the tour.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use chrono::Utc;
use mongodb::Database;
use mongodb::bson::{Bson, Document, doc};

use super::daemon::Daemon;
use super::data::{Booking, Channel, Temple};
use super::judge;
use super::say::{Voice, count, thousands, time};
use super::stage::{Stage, counts, total};
use super::watch::{Sign, typical_and_slowest, until, watch};
use crate::command::Status;

mod alone;
mod clash;
mod verdict;

/// The story in progress.
pub(super) struct Tour<'a> {
    voice: &'a Voice,
    stage: &'a Stage,
    daemon: &'a Daemon,
    temple: Temple,
}

impl<'a> Tour<'a> {
    pub(super) fn new(voice: &'a Voice, stage: &'a Stage, daemon: &'a Daemon) -> Self {
        Self {
            voice,
            stage,
            daemon,
            temple: Temple::new(rand::random(), Utc::now()),
        }
    }

    /// All chapters. `started` is when the daemon was started.
    pub(super) async fn tell(mut self, started: Instant) -> Result<()> {
        self.first_sync(started).await?;
        self.either_way().await?;
        self.apart_and_together().await?;
        self.two_edits().await?;
        self.one_name_twice().await?;
        self.verdict().await?;
        self.voice.gap();
        self.voice
            .say(&format!("That was the tour: {}.", time(started.elapsed())));
        Ok(())
    }

    async fn first_sync(&self, started: Instant) -> Result<()> {
        let (local, remote) = (&self.stage.local, &self.stage.remote);
        let here = counts(local).await?;
        let (expected, before) = (total(local).await?, total(remote).await?);
        self.voice.chapter(1, "The first sync");
        self.voice.say(match before {
            0 => "The cloud is empty. Sangam compares the two databases and sends what is missing.",
            _ => "Both hold the data of an earlier tour. Sangam goes on where it was stopped.",
        });
        self.daemon.ready().await?;
        if before == 0 {
            until("all documents are in the cloud", async || {
                let arrived = total(remote).await?;
                self.voice.progress(arrived, expected);
                Ok((arrived == expected).then_some(()))
            })
            .await?;
        }
        let took = self.settled("the first sync ends", started).await?;
        if before == 0 {
            let rate = expected as f64 / took.as_secs_f64();
            self.voice.good(&format!(
                "{} in {} are in the cloud, {} after Sangam was started: {} a second.",
                count(expected, "document"),
                count(here.len() as u64, "collection"),
                time(took),
                thousands(rate as u64),
            ));
        } else {
            self.voice
                .good(&format!("Both are equal, {} after the start.", time(took)));
        }
        Ok(())
    }

    async fn either_way(&mut self) -> Result<()> {
        const MORE: u64 = 20;
        self.voice.chapter(2, "A booking, either way");
        let (booking, took) = self.book(Channel::Counter).await?;
        self.voice.say(&format!(
            "At the temple's counter {} books: {} on {}.",
            booking.name, booking.ritual, booking.when
        ));
        self.voice
            .good(&format!("In the cloud after {}.", time(took)));
        let (booking, took) = self.book(Channel::Website).await?;
        self.voice.say(&format!(
            "From abroad, on the website, {} books: {} on {}.",
            booking.name, booking.ritual, booking.when
        ));
        self.voice
            .good(&format!("In the temple after {}.", time(took)));

        let mut rows = vec![];
        for (channel, way) in [
            (Channel::Counter, "temple to cloud"),
            (Channel::Website, "cloud to temple"),
        ] {
            let mut times = vec![];
            for at in 1..=MORE {
                self.voice.live(&format!("{way}: {at} of {MORE}"));
                times.push(self.book(channel).await?.1);
            }
            let (typical, slowest) = typical_and_slowest(&times);
            rows.push(vec![way.to_owned(), time(typical), time(slowest)]);
        }
        self.voice
            .say(&format!("And {MORE} more each way, one after another:"));
        self.voice
            .table(&["", "typical", "slowest"], &rows, &[1, 2]);
        self.voice.say(
            "The times run from just before the write until another program reads it on the other \
             side.",
        );
        Ok(())
    }

    /// Makes a booking on one side and waits until the other shows it; how long that took.
    async fn book(&mut self, channel: Channel) -> Result<(Booking, Duration)> {
        let booking = self.temple.booking(channel);
        let (here, there) = match channel {
            Channel::Counter => (&self.stage.local, &self.stage.remote),
            Channel::Website => (&self.stage.remote, &self.stage.local),
        };
        let id = booking.document.get("_id").cloned().unwrap_or(Bson::Null);
        let start = Instant::now();
        insert(here, "bookings", &booking.document).await?;
        let sign = Sign::present(there, "bookings", &[id]);
        let took = watch("a booking on the other side", &[sign], start).await?;
        Ok((booking, took))
    }

    /// Cuts the line and waits until the daemon has noticed.
    async fn cut(&self) -> Result<(Duration, Status)> {
        let start = Instant::now();
        self.stage.cut();
        let status = until("the daemon notices that the line is cut", async || {
            let status = self.daemon.status().await?;
            Ok((status.link.state != "online").then_some(status))
        })
        .await?;
        Ok((start.elapsed(), status))
    }

    /// Mends the line and waits until the signs show; how long that took.
    async fn mend(&self, what: &str, signs: &[Sign]) -> Result<Duration> {
        let start = Instant::now();
        self.stage.mend();
        let watching = std::pin::pin!(watch(what, signs, start));
        let showing = std::pin::pin!(self.show_queue());
        match futures::future::select(watching, showing).await {
            futures::future::Either::Left((took, _)) => took,
            futures::future::Either::Right((never, _)) => match never {},
        }
    }

    /// Shows in the changing line how much is waiting, until dropped.
    async fn show_queue(&self) -> std::convert::Infallible {
        loop {
            if let Ok(waiting) = self.daemon.waiting().await {
                self.voice.live(&format!("queue {}", thousands(waiting)));
            }
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
    }

    /// Waits until nothing is in the queue but what open conflicts hold, and a full comparison finds
    /// nothing different but the same; when the queue was empty, counted from `since`.
    async fn settled(&self, what: &str, since: Instant) -> Result<Duration> {
        until(what, async || {
            if self.daemon.waiting().await? > 0 {
                return Ok(None);
            }
            let took = since.elapsed();
            let found = self.stage.compare().await?;
            let conflicts = self.stage.open_conflicts().await?;
            let left = judge::unexplained(&found, &conflicts);
            ensure!(
                left.is_empty(),
                "{} differ, first {}",
                count(left.len() as u64, "document"),
                left.first()
                    .map(|first| judge::describe(first))
                    .unwrap_or_default()
            );
            Ok(Some(took))
        })
        .await
    }
}

async fn insert(database: &Database, collection: &str, document: &Document) -> Result<()> {
    let collection = database.collection::<Document>(collection);
    collection.insert_one(document).await?;
    Ok(())
}

/// Sets fields of documents as the app does, with a new `updatedAt`; all of them must be there.
async fn set(database: &Database, collection: &str, ids: &[Bson], values: Document) -> Result<()> {
    let mut values = values;
    values.insert("updatedAt", super::data::date(Utc::now()));
    let collection = database.collection::<Document>(collection);
    let changed = collection
        .update_many(doc! {"_id": {"$in": ids}}, doc! {"$set": values})
        .await?;
    ensure!(
        changed.matched_count == ids.len() as u64,
        "a document to be changed is not there"
    );
    Ok(())
}

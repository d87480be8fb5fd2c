//! Chapters 3 to 5: the line is cut, both sides go on, and what becomes of it.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use futures::TryStreamExt;
use mongodb::Database;
use mongodb::bson::{Bson, Document, doc};

use super::{Tour, set};
use crate::demo::data::Channel;
use crate::demo::say::{count, thousands, time};
use crate::demo::watch::{Sign, until};

/// Local writes come in this many bursts, so that one sees the queue grow.
const BURSTS: usize = 5;
const BOOKINGS_A_BURST: usize = 40;
const STOCK_A_BURST: usize = 6;
/// How often one event is edited.
const EDITS: i32 = 25;
const REMOTE_BOOKINGS: usize = 30;
const REMOTE_EVENTS: usize = 12;
const REMOTE_DELETED: usize = 3;

impl Tour<'_> {
    /// Chapters 3 and 4.
    pub(super) async fn apart_and_together(&mut self) -> Result<()> {
        self.voice.chapter(3, "The line is cut");
        let (noticed, status) = self.cut().await?;
        self.voice
            .say(&format!("Sangam notices after {} and says:", time(noticed)));
        let message = status.link.message.unwrap_or(status.link.state);
        self.voice
            .say(&format!("“{}”", message.trim_end_matches('.')));
        self.voice.say("Both sides go on working:");
        self.voice.table(
            &["", "", ""],
            &[
                row(
                    "temple",
                    &format!(
                        "{} new bookings, {} shelves counted, one event edited {EDITS} times",
                        BURSTS * BOOKINGS_A_BURST,
                        BURSTS * STOCK_A_BURST
                    ),
                ),
                row(
                    "cloud",
                    &format!(
                        "{REMOTE_BOOKINGS} new bookings, {REMOTE_EVENTS} events moved, \
                    {REMOTE_DELETED} pictures deleted"
                    ),
                ),
            ],
            &[],
        );
        let (up, mut signs) = self.write_here().await?;
        let (down, more) = self.write_there().await?;
        signs.extend(more);
        self.voice.good(&format!(
            "{} wait in Sangam's queue on disk. The event edited {EDITS} times is one of them: only \
             its last state has to travel.",
            count(up, "document")
        ));

        self.voice.chapter(4, "The line is back");
        let start = Instant::now();
        let took = self
            .mend("everything has arrived on both sides", &signs)
            .await?;
        self.voice.good(&format!(
            "Everything had arrived {} later: {} sent, {} fetched.",
            time(took),
            thousands(up),
            thousands(down)
        ));
        self.settled("both sides are equal", start).await?;
        self.voice
            .good("Both databases are equal, and the queue is empty.");
        Ok(())
    }

    /// Writes to the local database in bursts and waits until the queue has them. How many documents
    /// that were, and by what they are known in the cloud.
    async fn write_here(&mut self) -> Result<(u64, Vec<Sign>)> {
        let (local, remote) = (&self.stage.local.clone(), &self.stage.remote.clone());
        let shelves = some_ids(local, "stock", BURSTS * STOCK_A_BURST).await?;
        let event = some_ids(local, "events", 1).await?;
        let counted_by = format!("count {:06x}", rand::random_range(0..0x100_0000));
        let mut booked: Vec<Bson> = vec![];
        let mut grown = vec![];
        let mut expected = 0;
        for shelf in shelves.chunks(STOCK_A_BURST) {
            booked.extend(
                self.bookings(local, Channel::Counter, BOOKINGS_A_BURST)
                    .await?,
            );
            set(local, "stock", shelf, doc! {"countedBy": &counted_by}).await?;
            expected += (BOOKINGS_A_BURST + shelf.len()) as u64;
            grown.push(self.queued(expected).await?);
        }
        for edit in 1..=EDITS {
            set(local, "events", &event, doc! {"expected": 500 + edit}).await?;
        }
        let last = self.queued(expected + 1).await?;
        grown.push(last);
        let grown: Vec<String> = grown.into_iter().map(thousands).collect();
        self.voice
            .say(&format!("The queue grows: {}", grown.join(" · ")));
        let signs = vec![
            Sign::present(remote, "bookings", &booked),
            Sign::changed(remote, "stock", &shelves, doc! {"countedBy": counted_by}),
            Sign::changed(remote, "events", &event, doc! {"expected": 500 + EDITS}),
        ];
        Ok((last, signs))
    }

    /// Writes to the cloud. How many documents that were, and by what they are known here.
    async fn write_there(&mut self) -> Result<(u64, Vec<Sign>)> {
        let (local, remote) = (&self.stage.local.clone(), &self.stage.remote.clone());
        let booked = self
            .bookings(remote, Channel::Website, REMOTE_BOOKINGS)
            .await?;
        // The first is edited on the other side; two edits of one document have a chapter of their own.
        let events = some_ids(remote, "events", REMOTE_EVENTS + 1)
            .await?
            .split_off(1);
        let venue = format!("Tent {}", rand::random_range(1..10_000));
        set(remote, "events", &events, doc! {"venue": &venue}).await?;
        let pictures = some_ids(remote, "gallery_images", REMOTE_DELETED).await?;
        let gallery = remote.collection::<Document>("gallery_images");
        gallery
            .delete_many(doc! {"_id": {"$in": &pictures}})
            .await?;
        let signs = vec![
            Sign::present(local, "bookings", &booked),
            Sign::changed(local, "events", &events, doc! {"venue": venue}),
            Sign::absent(local, "gallery_images", &pictures),
        ];
        Ok(((booked.len() + events.len() + pictures.len()) as u64, signs))
    }

    async fn bookings(
        &mut self,
        on: &Database,
        channel: Channel,
        count: usize,
    ) -> Result<Vec<Bson>> {
        let made = (0..count).map(|_| self.temple.booking(channel).document);
        let made: Vec<Document> = made.collect();
        let written = on
            .collection::<Document>("bookings")
            .insert_many(&made)
            .await?;
        Ok(written.inserted_ids.into_values().collect())
    }

    /// Waits until the daemon's queue has at least so many documents; how many it has.
    async fn queued(&self, expected: u64) -> Result<u64> {
        until(
            &format!("{expected} documents wait in the queue"),
            async || {
                let queued = self.daemon.waiting().await?;
                self.voice.live(&format!("queue {queued}"));
                Ok((queued >= expected).then_some(queued))
            },
        )
        .await
    }

    /// Chapter 5.
    pub(super) async fn two_edits(&mut self) -> Result<()> {
        let (local, remote) = (&self.stage.local, &self.stage.remote);
        self.voice.chapter(5, "Two people change one booking");
        let conflicts = self.daemon.status().await?.unresolved_conflicts;
        let bookings = local.collection::<Document>("bookings");
        let reserved = doc! {"status": "reserved", "channel": "counter"};
        let booking = bookings.find_one(reserved).sort(doc! {"_id": -1}).await?;
        let booking = booking.context("there is no reserved booking")?;
        let id = [booking.get("_id").cloned().unwrap_or(Bson::Null)];
        let before = booking.get_str("phone").unwrap_or("none").to_owned();
        let phone = loop {
            let phone = self.temple.phone();
            if phone != before {
                break phone;
            }
        };
        self.cut().await?;
        self.voice.say(&format!(
            "The line is cut again. At the counter {} pays; abroad, the family corrects the phone \
             number of the same booking.",
            booking.get_str("name").unwrap_or("somebody")
        ));
        set(local, "bookings", &id, doc! {"status": "paid"}).await?;
        set(remote, "bookings", &id, doc! {"phone": &phone}).await?;
        let both = doc! {"status": "paid", "phone": &phone};
        let signs = [local, remote].map(|side| Sign::changed(side, "bookings", &id, both.clone()));
        let start = Instant::now();
        let took = self.mend("both edits on both sides", &signs).await?;
        let line = |who: &str, status: &str, phone: &str| {
            vec![who.to_owned(), status.to_owned(), phone.to_owned()]
        };
        self.voice.table(
            &["", "status", "phone"],
            &[
                line("before", "reserved", &before),
                line("temple", "paid", "·"),
                line("cloud", "·", &phone),
                line("both, now", "paid", &phone),
            ],
            &[],
        );
        self.settled("both sides are equal", start).await?;
        let after = self.daemon.status().await?.unresolved_conflicts;
        ensure!(
            after == conflicts,
            "two edits of different fields were taken for a conflict"
        );
        self.voice.good(&format!(
            "Merged on both sides, {} after the line was back. Nobody's edit was lost, and nobody \
             was asked.",
            time(took)
        ));
        Ok(())
    }
}

fn row(who: &str, what: &str) -> Vec<String> {
    vec![who.to_owned(), what.to_owned()]
}

/// The first so many `_id`s of a collection.
async fn some_ids(database: &Database, collection: &str, count: usize) -> Result<Vec<Bson>> {
    let collection = database.collection::<Document>(collection);
    let ids: Vec<Document> = collection
        .find(doc! {})
        .projection(doc! {"_id": 1})
        .sort(doc! {"_id": 1})
        .limit(count as i64)
        .await?
        .try_collect()
        .await?;
    ensure!(
        ids.len() == count,
        "{} has too few documents left",
        collection.name()
    );
    Ok(ids
        .into_iter()
        .filter_map(|id| id.get("_id").cloned())
        .collect())
}

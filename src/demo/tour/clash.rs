//! Chapter 6: one username, taken on both sides.

use anyhow::{Result, ensure};
use chrono::Utc;
use mongodb::bson::{Bson, Document, doc};
use std::time::Instant;

use super::{Tour, insert, set};
use crate::demo::data::{Channel, date};
use crate::demo::judge::{self, Conflict};
use crate::demo::say::time;
use crate::demo::watch::{Sign, until, watch};

impl Tour<'_> {
    /// Chapter 6.
    pub(super) async fn one_name_twice(&mut self) -> Result<()> {
        let (local, remote) = (&self.stage.local.clone(), &self.stage.remote.clone());
        self.voice.chapter(6, "One name, taken twice");
        let before = self.stage.open_conflicts().await?.len();
        let username = match self.stage.place.memory.tours {
            1 => "meera".to_owned(),
            tour => format!("meera{tour}"),
        };
        let here = self.temple.new_admin(&username, "Meera", "counter");
        let there = self.temple.new_admin(&username, "Mira", "editor");
        self.cut().await?;
        self.voice.say(&format!(
            "While the line is cut, the temple and the cloud each make an account “{username}”. The \
             app allows a username only once, so the two can't both be everywhere."
        ));
        insert(local, "admins", &here).await?;
        insert(remote, "admins", &there).await?;
        let start = Instant::now();
        self.stage.mend();
        let conflict = self.conflict_about(&here, &there).await?;
        self.voice.good(&format!(
            "One conflict on record, {} after the line was back: {} in {}.",
            time(start.elapsed()),
            conflict.field,
            conflict.collection
        ));
        self.show(&conflict);

        let (_, booked) = self.book(Channel::Counter).await?;
        let seen = self.seen_in_admins().await?;
        self.settled("the rest is equal", start).await?;
        let now = self.stage.open_conflicts().await?.len();
        ensure!(
            now == before + 1,
            "one clash, but {} conflicts on record",
            now - before
        );
        self.voice.say(
            "Nothing was overwritten: each side keeps its own account until somebody decides. \
             Nothing else waits for that.",
        );
        self.voice.good(&format!(
            "A booking made meanwhile was in the cloud after {}, a change to another admin in the \
             temple after {}.",
            time(booked),
            time(seen)
        ));
        Ok(())
    }

    /// Waits for the record of a clash between these two documents.
    async fn conflict_about(&self, here: &Document, there: &Document) -> Result<Conflict> {
        let ids = [here, there].map(|document| document.get("_id").cloned());
        until("the conflict is on record", async || {
            let open = self.stage.open_conflicts().await?;
            Ok(open.into_iter().find(|conflict| {
                [&conflict.local_id, &conflict.remote_id]
                    .into_iter()
                    .any(|id| ids.iter().flatten().any(|own| own == id))
            }))
        })
        .await
    }

    /// Both versions, side by side.
    fn show(&self, conflict: &Conflict) {
        let value = |of: &Document, field: &str| of.get(field).map_or("·".into(), judge::plain);
        let rows: Vec<Vec<String>> = ["username", "name", "role", "phone"]
            .iter()
            .map(|field| {
                let (here, there) = (
                    value(&conflict.local, field),
                    value(&conflict.remote, field),
                );
                vec![(*field).to_owned(), here, there]
            })
            .collect();
        self.voice.table(&["", "temple", "cloud"], &rows, &[]);
    }

    /// Changes another admin in the cloud and waits until the local database shows it.
    async fn seen_in_admins(&self) -> Result<std::time::Duration> {
        let admins = self.stage.remote.collection::<Document>("admins");
        let other = admins.find_one(doc! {"username": "aarav"}).await?;
        let id = [other
            .and_then(|a| a.get("_id").cloned())
            .unwrap_or(Bson::Null)];
        let login = doc! {"lastLogin": date(Utc::now())};
        let start = Instant::now();
        set(&self.stage.remote, "admins", &id, login.clone()).await?;
        let sign = Sign::changed(&self.stage.local, "admins", &id, login);
        watch("a change to another admin in the temple", &[sign], start).await
    }
}

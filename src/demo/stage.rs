//! What the story plays on: two replica sets, the line between them, and the temple's data.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use chrono::Utc;
use mongodb::bson::{Document, doc};
use mongodb::options::IndexOptions;
use mongodb::{Database, IndexModel};

use super::data::{DATABASE, Temple};
use super::judge::Conflict;
use super::place::Place;
use crate::compare::{Comparison, OWN_COLLECTIONS, compare};
use crate::config::FieldNames;
use crate::faultlink::{FaultLink, Mode};
use crate::mongod::{MongoServer, ServerOptions, find_or_fetch};

/// Round trip of the line, about that to a data centre some countries away.
pub(super) const ROUND_TRIP: Duration = Duration::from_millis(40);
/// Any number will do; the same number gives the same temple.
const SEED: u64 = 1_008;

/// The two databases and the line. Dropping it kills the servers.
#[derive(Debug)]
pub(super) struct Stage {
    local_server: MongoServer,
    remote_server: MongoServer,
    pub(super) link: FaultLink,
    /// The local database.
    pub(super) local: Database,
    /// The remote database, past the line.
    pub(super) remote: Database,
    /// Last, so that the folder goes when nobody uses it any more.
    pub(super) place: Place,
}

impl Stage {
    /// Starts the servers on the folder's data, opens the line, fills the local database if it
    /// never was, and writes the daemon's configuration.
    pub(super) async fn set(mut place: Place) -> Result<Self> {
        // Before the two servers look for it side by side.
        tokio::task::spawn_blocking(find_or_fetch)
            .await
            .context("looking for the MongoDB server")??;
        ports_are_free(&place)?;
        let start = |name: &str, port| {
            let options = ServerOptions {
                port: Some(port),
                set_name: Some(name.into()),
                ..ServerOptions::default()
            };
            let dir = place.dir().join(name);
            async move { MongoServer::start_with(&dir, options).await }
        };
        let memory = &place.memory;
        let (local_server, remote_server) = tokio::try_join!(
            start("local", memory.local_port),
            start("remote", memory.remote_port)
        )?;
        let link = FaultLink::open_on(memory.link_port, remote_server.address()).await?;
        link.round_trip(ROUND_TRIP);
        let local = local_server.client().await?.database(DATABASE);
        let remote = remote_server.client().await?.database(DATABASE);
        if !place.memory.filled {
            fill(&local).await.context("filling the local database")?;
            place.memory.filled = true;
        }
        place.memory.tours += 1;
        place.remember()?;
        for database in [&local, &remote] {
            unique_usernames(database).await?;
        }
        place.write_config(&local_server.uri(), &link.uri())?;
        Ok(Self {
            local_server,
            remote_server,
            link,
            local,
            remote,
            place,
        })
    }

    /// URI of the local replica set.
    pub(super) fn local_uri(&self) -> String {
        self.local_server.uri()
    }

    /// URI of the remote replica set, past the line.
    pub(super) fn remote_uri(&self) -> String {
        self.remote_server.uri()
    }

    /// Cuts the line.
    pub(super) fn cut(&self) {
        self.link.cut();
    }

    /// Mends the line; its delay stays.
    pub(super) fn mend(&self) {
        self.link.set(Mode::Pass);
    }

    /// Compares both databases whole.
    pub(super) async fn compare(&self) -> Result<Comparison> {
        compare(&self.local, &self.remote, &FieldNames::default(), &[]).await
    }

    /// Conflicts that wait for a person, oldest first.
    pub(super) async fn open_conflicts(&self) -> Result<Vec<Conflict>> {
        use futures::TryStreamExt;
        let records = self.local.collection::<Document>("conflict_logs");
        let open = records
            .find(doc! {"resolved": false})
            .sort(doc! {"timestamp": 1});
        let records: Vec<Document> = open.await?.try_collect().await?;
        Ok(records.iter().map(Conflict::of).collect())
    }

    /// Stops both servers in order; the folder goes if it is temporary.
    pub(super) async fn stop(mut self) -> Result<()> {
        let (local, remote) = tokio::join!(self.local_server.stop(), self.remote_server.stop());
        local.and(remote)
    }
}

/// Documents by collection, in the order of names, without Sangam's own collections.
pub(super) async fn counts(database: &Database) -> Result<Vec<(String, u64)>> {
    let mut names = database.list_collection_names().await?;
    names.retain(|name| !name.starts_with("system.") && !OWN_COLLECTIONS.contains(&name.as_str()));
    names.sort();
    let mut counts = vec![];
    for name in names {
        let collection = database.collection::<Document>(&name);
        counts.push((name, collection.estimated_document_count().await?));
    }
    Ok(counts)
}

/// Documents in all collections but Sangam's own.
pub(super) async fn total(database: &Database) -> Result<u64> {
    Ok(counts(database).await?.iter().map(|(_, count)| count).sum())
}

fn ports_are_free(place: &Place) -> Result<()> {
    let memory = &place.memory;
    for port in [
        memory.local_port,
        memory.remote_port,
        memory.link_port,
        memory.api_port,
    ] {
        ensure!(
            TcpListener::bind(("127.0.0.1", port)).is_ok(),
            "port {port}, which the data in {} are bound to, is taken by another program",
            place.dir().display()
        );
    }
    Ok(())
}

async fn fill(local: &Database) -> Result<()> {
    // A demo that ended while filling left a part.
    local.drop().await?;
    for collection in Temple::new(SEED, Utc::now()).everything() {
        local
            .collection::<Document>(collection.name)
            .insert_many(&collection.documents)
            .await
            .map_err(|error| anyhow!("{}: {error}", collection.name))?;
    }
    Ok(())
}

async fn unique_usernames(database: &Database) -> Result<()> {
    let index = IndexModel::builder()
        .keys(doc! {"username": 1})
        .options(IndexOptions::builder().unique(true).build())
        .build();
    let admins = database.collection::<Document>("admins");
    admins.create_index(index).await?;
    Ok(())
}

//! The doctor: looks at everything that Sangam stands on, from the outside, and says of each thing what
//! is the matter, why it matters and what to type. It changes nothing, and needs no daemon.

mod data;
mod place;
pub mod rights;
mod server;

use serde::{Deserialize, Serialize};

use crate::client::Client;
use crate::command::Status;
use crate::config::Loaded;
use crate::decide::Side;

/// How grave a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Good,
    /// It works, but a person should know.
    Warning,
    /// It doesn't work.
    Problem,
}

/// Something that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at: `config`, `files`, `daemon`, `local`, `remote`, `clocks`, `indexes`,
    /// `documents`.
    pub check: String,
    /// How grave.
    pub level: Level,
    /// What is so.
    pub what: String,
    /// Why it matters; empty where all is well.
    pub why: String,
    /// What to type, or to do; a line each.
    pub fix: Vec<String>,
}

/// Everything that was found, in the order in which it was looked at.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// What was found.
    pub findings: Vec<Finding>,
}

impl Report {
    fn good(&mut self, check: &str, what: impl Into<String>) {
        self.add(check, Level::Good, what.into(), "", vec![]);
    }

    fn warn<F: Into<String>>(
        &mut self,
        check: &str,
        what: impl Into<String>,
        why: &str,
        fix: impl IntoIterator<Item = F>,
    ) {
        let fix = fix.into_iter().map(Into::into).collect();
        self.add(check, Level::Warning, what.into(), why, fix);
    }

    fn bad<F: Into<String>>(
        &mut self,
        check: &str,
        what: impl Into<String>,
        why: &str,
        fix: impl IntoIterator<Item = F>,
    ) {
        let fix = fix.into_iter().map(Into::into).collect();
        self.add(check, Level::Problem, what.into(), why, fix);
    }

    fn add(&mut self, check: &str, level: Level, what: String, why: &str, fix: Vec<String>) {
        self.findings.push(Finding {
            check: check.into(),
            level,
            what,
            why: why.into(),
            fix,
        });
    }

    /// The gravest level.
    pub fn worst(&self) -> Level {
        self.findings
            .iter()
            .map(|f| f.level)
            .max()
            .unwrap_or(Level::Good)
    }
}

/// Looks at everything.
pub async fn examine(loaded: &Loaded, client: &Client) -> Report {
    let mut report = Report::default();
    let status: Option<Status> = client.get("/api/sync/status").await.ok();
    place::config(&mut report, loaded);
    place::files(&mut report, loaded);
    let locked = place::is_locked(&loaded.config.state_dir);
    place::daemon(&mut report, status.as_ref(), locked);
    let local = server::look(&mut report, Side::Local, loaded, locked).await;
    let remote = server::look(&mut report, Side::Remote, loaded, locked).await;
    if let (Some(local), Some(remote)) = (&local, &remote) {
        data::clocks(&mut report, local, remote);
    }
    data::unique(&mut report, &loaded.config, local.as_ref(), remote.as_ref()).await;
    data::stamps(&mut report, &loaded.config, local.as_ref(), remote.as_ref()).await;
    if status.is_some() {
        data::schema(&mut report, client).await;
    }
    data::refused(&mut report, status.as_ref());
    report
}

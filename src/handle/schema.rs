//! Indexes and options, for CLI and API.

use std::time::Duration;

use super::Handle;
use crate::command::CommandError;
use crate::schema::{self, Ask, Report};

/// How long an answer waits for indexes to be built; longer builds are told as under way.
const PATIENCE: Duration = Duration::from_secs(10);

/// Looks that may fail before it is said.
const TRIES: usize = 5;

impl Handle {
    /// What the last look at indexes and options found.
    pub fn schema(&self) -> Report {
        schema::report(&self.shared)
    }

    /// Looks now; with `create` everything that is missing is made.
    pub async fn look_at_schema(&self, create: bool) -> Result<Report, CommandError> {
        let shared = &self.shared;
        if create {
            self.takes_orders()?;
        }
        if shared.settings().config.remote_uri.is_none() {
            return Err(CommandError::NotConfigured);
        }
        let ask = Ask {
            retry: create,
            create,
        };
        let began = tokio::time::Instant::now();
        let mut report = self.look(ask).await?;
        while create && !report.building.is_empty() && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(50)).await;
            report = schema::report(shared);
        }
        // What was built or refused meanwhile is seen by another look only.
        self.look(Ask::default()).await
    }

    /// After an outage connections may turn out to be dead one by one: a person need not know.
    async fn look(&self, ask: Ask) -> Result<Report, CommandError> {
        for _ in 0..TRIES {
            self.wait_online().await?;
            match schema::look(&self.shared, ask).await {
                Err(failure) if failure.is_offline() => {
                    tracing::debug!(%failure, "a look at the indexes");
                }
                outcome => return Ok(outcome?),
            }
        }
        self.wait_online().await?;
        Ok(schema::look(&self.shared, ask).await?)
    }
}

//! The link: what we know of the way to the remote, and why.
//!
//! Real traffic feeds it. A first failure makes it `Interrupted`, a failed probe `Offline`; a probe
//! runs in an outage and when the link has been silent for an interval. Whoever waits for the link
//! is woken at once when it is back (R20).

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio::sync::watch;

use crate::command::LinkStatus;
use crate::failure::{Class, Failure, Reason};
use crate::metrics::Metrics;

/// Names of all states.
pub const STATES: [&str; 4] = ["not_configured", "online", "interrupted", "offline"];

/// State of the link.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// No remote is configured.
    NotConfigured,
    /// The remote answers.
    Online,
    /// Something failed; a probe will tell.
    Interrupted,
    /// Probes fail; the next one is due then.
    Offline {
        /// When the next probe is due.
        next_probe: DateTime<Utc>,
    },
}

impl State {
    /// As in the API.
    pub fn name(&self) -> &'static str {
        STATES[match self {
            Self::NotConfigured => 0,
            Self::Online => 1,
            Self::Interrupted => 2,
            Self::Offline { .. } => 3,
        }]
    }
}

/// The state with its history.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Current state.
    pub state: State,
    /// Since when.
    pub since: DateTime<Utc>,
    /// Why not online.
    pub reason: Option<Reason>,
    /// Last try, by traffic or probe.
    pub last_check: Option<DateTime<Utc>>,
    last_heard: Option<Instant>,
    online_since: Option<Instant>,
}

impl Snapshot {
    /// Whether the remote answers.
    pub fn is_online(&self) -> bool {
        self.state == State::Online
    }

    /// For the API.
    pub fn status(&self) -> LinkStatus {
        let next_probe = match self.state {
            State::Offline { next_probe } => Some(next_probe),
            _ => None,
        };
        LinkStatus {
            state: self.state.name().into(),
            since: self.since,
            reason: self.reason.map(|r| r.name().into()),
            message: match self.state {
                State::NotConfigured => {
                    Some("remote database not configured; set remote.uri in sangam.toml or MONGODB_CLOUD_URL".into())
                }
                _ => self.reason.map(|r| r.message().into()),
            },
            next_probe,
            last_check: self.last_check,
        }
    }
}

/// The link, shared by all tasks.
pub struct Link {
    state: watch::Sender<Snapshot>,
    metrics: Arc<Metrics>,
}

impl Link {
    /// A link that nobody has tried yet.
    pub fn new(configured: bool, metrics: Arc<Metrics>) -> Self {
        let state = if configured {
            State::Interrupted
        } else {
            State::NotConfigured
        };
        let first = Snapshot {
            state,
            since: Utc::now(),
            reason: None,
            last_check: None,
            last_heard: None,
            online_since: None,
        };
        Self {
            state: watch::Sender::new(first),
            metrics,
        }
    }

    /// How it is now.
    pub fn snapshot(&self) -> Snapshot {
        self.state.borrow().clone()
    }

    /// Whether the remote answers.
    pub fn is_online(&self) -> bool {
        self.state.borrow().is_online()
    }

    /// To wait for changes.
    pub fn subscribe(&self) -> watch::Receiver<Snapshot> {
        self.state.subscribe()
    }

    /// The remote answered.
    pub fn heard(&self) {
        self.state.send_if_modified(|s| {
            s.last_check = Some(Utc::now());
            s.last_heard = Some(Instant::now());
            let came_back = s.state != State::Online;
            if came_back {
                tracing::info!("link is online");
                (s.state, s.since, s.reason) = (State::Online, Utc::now(), None);
                self.metrics.link_changed(s.state.name());
                s.online_since = s.last_heard;
            }
            came_back
        });
    }

    /// An operation on the remote failed; only failures of the way count.
    pub fn failed(&self, failure: &Failure) {
        let Class::Offline(reason) = failure.class else {
            return;
        };
        self.state.send_if_modified(|s| {
            s.last_check = Some(Utc::now());
            if s.state != State::Online {
                return false;
            }
            tracing::warn!(
                reason = reason.name(),
                "link interrupted: {}",
                reason.message()
            );
            (s.state, s.since, s.reason) = (State::Interrupted, Utc::now(), Some(reason));
            self.metrics.link_changed(s.state.name());
            true
        });
    }

    /// A probe failed; the next one is due after `delay`.
    pub fn probe_failed(&self, reason: Reason, delay: Duration) {
        self.state.send_if_modified(|s| {
            let now = Utc::now();
            let next_probe =
                now + chrono::Duration::from_std(delay).unwrap_or(chrono::Duration::zero());
            s.last_check = Some(now);
            if !matches!(s.state, State::Offline { .. }) || s.reason != Some(reason) {
                tracing::warn!(
                    reason = reason.name(),
                    "link is offline: {}",
                    reason.message()
                );
            }
            if !matches!(s.state, State::Offline { .. } | State::Interrupted) {
                s.since = now;
            }
            if !matches!(s.state, State::Offline { .. }) {
                self.metrics.link_changed(STATES[3]);
            }
            s.state = State::Offline { next_probe };
            s.reason = Some(reason);
            true
        });
    }

    /// How long nothing was heard, while online.
    pub fn silent_for(&self) -> Duration {
        self.state
            .borrow()
            .last_heard
            .map_or(Duration::MAX, |t| t.elapsed())
    }

    /// When the remote last came back.
    pub fn online_since(&self) -> Option<Instant> {
        self.state.borrow().online_since
    }

    /// Waits until the remote answers.
    pub async fn online(&self) {
        // The sender lives as long as `self`, so waiting can't fail.
        let _ = self.state.subscribe().wait_for(Snapshot::is_online).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn traffic_feeds_the_link_and_wakes_those_who_wait() {
        let link = Arc::new(Link::new(true, Arc::default()));
        assert!(!link.is_online());
        let waiter = tokio::spawn({
            let link = link.clone();
            async move { link.online().await }
        });
        link.probe_failed(Reason::Dns, Duration::from_secs(1));
        assert_eq!(link.snapshot().status().reason.as_deref(), Some("dns"));
        link.heard();
        waiter.await.unwrap();
        let since = link.snapshot().since;
        link.heard();
        assert_eq!(link.snapshot().since, since);
        link.failed(&Failure::from_code(121, "DocumentValidationFailure"));
        assert!(
            link.is_online(),
            "a rejected document says nothing about the link"
        );
        link.failed(&Failure::timeout());
        assert_eq!(link.snapshot().state, State::Interrupted);
    }
}

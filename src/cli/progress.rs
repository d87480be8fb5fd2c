//! How far long work is, on standard error while it goes on: a bar on a terminal, now and then a line
//! elsewhere. With `--json` a program listens, which is told nothing but the answer.

use std::collections::VecDeque;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};

use super::{Failure, Output};
use crate::client::Client;
use crate::command::Status;
use crate::handle::Handle;
use crate::words;

/// Time between two looks, on a terminal and elsewhere.
const LOOK: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(1)];
/// Shorter work needs no lines.
const FIRST_LINE: Duration = Duration::from_secs(2);
/// Time between two lines.
const LINES: Duration = Duration::from_secs(10);
/// The rate is that of the last so many looks.
const SAMPLES: usize = 20;

/// Who knows how far the work is.
pub(super) enum Source<'a> {
    /// The daemon does it, and goes on if this process ends.
    Daemon(&'a Client),
    /// It is done in this process.
    Here(&'a Handle),
}

impl Source<'_> {
    async fn status(&self) -> Option<Status> {
        match self {
            Self::Daemon(client) => client.get("/api/sync/status").await.ok(),
            Self::Here(handle) => handle.status().await.ok(),
        }
    }
}

/// Shows how far `work` is until it ends. Ctrl-C ends the watching only: what the daemon does goes on,
/// and `work` in this process hears of it by itself.
pub(super) async fn watch<T>(
    source: Source<'_>,
    work: impl Future<Output = T>,
    output: Output,
) -> Result<T, Failure> {
    let interrupted = async {
        match source {
            Source::Daemon(_) if tokio::signal::ctrl_c().await.is_ok() => {}
            _ => std::future::pending().await,
        }
    };
    let mut screen = Screen::new(output);
    tokio::select! {
        done = work => Ok(done),
        () = interrupted => Err(Failure::new(
            "stopped watching; the daemon goes on with it",
            Some("`sangam status` says how far it is, `sangam pause` makes it wait"),
            Failure::INTERRUPTED,
        )),
        () = screen.follow(&source) => unreachable!("it never ends"),
    }
}

/// Where it is shown.
struct Screen {
    bar: Option<ProgressBar>,
    lines: bool,
    meter: Meter,
}

impl Drop for Screen {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Screen {
    fn new(output: Output) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = terminal.then(|| {
            let style = ProgressStyle::with_template("  {bar:24.cyan/dim} {msg}")
                .expect("the template is a constant")
                .progress_chars("━━─");
            ProgressBar::new(1).with_style(style)
        });
        Self {
            bar,
            lines: !terminal && !output.json,
            meter: Meter::default(),
        }
    }

    async fn follow(&mut self, source: &Source<'_>) {
        let look = LOOK[usize::from(self.bar.is_none())];
        let mut next_line = Instant::now() + FIRST_LINE;
        loop {
            tokio::time::sleep(look).await;
            let Some(far) = source.status().await.map(|status| self.meter.read(&status)) else {
                continue;
            };
            if let Some(bar) = &self.bar {
                bar.set_length(far.total.max(1));
                bar.set_position(far.done);
                bar.set_message(far.text());
            } else if self.lines && Instant::now() >= next_line {
                next_line = Instant::now() + LINES;
                // Standard error may be closed; the work goes on.
                let _ = writeln!(std::io::stderr().lock(), "{}", far.text());
            }
        }
    }
}

/// How far it is.
#[derive(Clone, Debug, PartialEq)]
struct Far {
    what: String,
    done: u64,
    total: u64,
    bytes: u64,
    /// Documents a second.
    rate: f64,
    seconds_left: Option<u64>,
    /// The collection at work, or what it waits for.
    at: String,
}

impl Far {
    fn text(&self) -> String {
        let mut parts = vec![format!(
            "{}: {} of {} documents",
            self.what,
            HumanCount(self.done),
            HumanCount(self.total)
        )];
        if self.bytes > 0 {
            parts.push(HumanBytes(self.bytes).to_string());
        }
        if self.rate >= 0.5 {
            parts.push(format!("{}/s", HumanCount(self.rate.round() as u64)));
        }
        if let Some(left) = self.seconds_left {
            parts.push(format!("{} left", words::span(Duration::from_secs(left))));
        }
        if !self.at.is_empty() {
            parts.push(self.at.clone());
        }
        parts.join(", ")
    }
}

/// Makes rates of what the status counts.
#[derive(Debug, Default)]
struct Meter {
    samples: VecDeque<(Instant, u64)>,
}

impl Meter {
    fn read(&mut self, status: &Status) -> Far {
        let at = match (status.is_online, status.is_paused) {
            (_, true) => "paused".to_owned(),
            (false, _) => format!("{}, it goes on by itself", words::link(status)),
            _ => String::new(),
        };
        if let Some(p) = status.progress.as_ref().filter(|p| p.documents < p.total) {
            self.samples.clear();
            return Far {
                what: p.what.replace('_', " "),
                done: p.documents,
                total: p.total,
                bytes: p.bytes,
                rate: p.rate,
                seconds_left: p.seconds_left,
                at: if at.is_empty() {
                    p.collection.clone()
                } else {
                    at
                },
            };
        }
        let run = status.current_run.as_ref();
        let moved = run.map_or(0, |run| {
            words::sum(&run.local_to_remote) + words::sum(&run.remote_to_local)
        });
        let waiting =
            (status.pending_documents + status.pending_inbox).saturating_sub(status.held_documents);
        let rate = self.rate(moved);
        Far {
            what: "moving".into(),
            done: moved,
            total: moved + waiting,
            bytes: run.map_or(0, |run| run.bytes_transferred),
            rate,
            seconds_left: (rate >= 0.5).then(|| (waiting as f64 / rate).ceil() as u64),
            at,
        }
    }

    fn rate(&mut self, moved: u64) -> f64 {
        let now = Instant::now();
        if self.samples.back().is_some_and(|(_, last)| *last > moved) {
            self.samples.clear();
        }
        self.samples.push_back((now, moved));
        if self.samples.len() > SAMPLES {
            self.samples.pop_front();
        }
        let Some((then, before)) = self.samples.front() else {
            return 0.0;
        };
        let time = now.duration_since(*then).as_secs_f64();
        if time > 0.0 {
            (moved - before) as f64 / time
        } else {
            0.0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_count_bytes_rate_and_time_left() {
        let mut far = Far {
            what: "first sync".into(),
            done: 12_345,
            total: 48_210,
            bytes: 3 << 20,
            rate: 812.4,
            seconds_left: Some(75),
            at: "bookings".into(),
        };
        assert_eq!(
            far.text(),
            "first sync: 12,345 of 48,210 documents, 3.00 MiB, 812/s, 1 m 15 s left, bookings"
        );
        far = Far {
            bytes: 0,
            rate: 0.0,
            seconds_left: None,
            at: String::new(),
            ..far
        };
        assert_eq!(far.text(), "first sync: 12,345 of 48,210 documents");
    }

    #[test]
    fn a_new_run_begins_a_new_rate() {
        let mut meter = Meter::default();
        for moved in [0, 500, 3] {
            assert!(meter.rate(moved) >= 0.0);
        }
        assert_eq!(meter.samples.len(), 1);
    }
}

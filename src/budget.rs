//! The link's budget: how many bytes a second may go to and come from the remote, by the hour.
//!
//! Bytes are counted before compression, so the line carries less. Who has spent more than there was
//! waits before the next command, never in the middle of one: no deadline runs meanwhile. Of those who
//! wait the one of the best [rank](crate::order) goes first, of equals the one that came first.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chrono::{Local, NaiveTime};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::order::{self, Rank};

/// A command of this size passes at any rate; smaller ones would waste round trips.
pub(crate) const SMALLEST: usize = 64 << 10;

/// How often a waiting command looks whether hours or settings have changed.
const LOOK: Duration = Duration::from_secs(1);

/// Of what better ranks spend while worse ones wait, this share is for those: a stream of better ones
/// must not stop them for ever in the middle of a batch.
const SHARE: f64 = 1.0 / 8.0;

/// `[link]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkConfig {
    /// Most bytes a second; 0 for no limit.
    pub max_rate: u64,
    /// When the line belongs to others.
    pub quiet_hours: Vec<Hours>,
    /// Most bytes a second in these hours; 0 for none.
    pub quiet_rate: u64,
    /// Patterns of the collections that go before all others, in this order.
    pub first: Vec<String>,
    /// Patterns of those that go after all others, in this order.
    pub last: Vec<String>,
}

/// A time of the day, by this machine's clock; it may pass midnight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hours {
    from: NaiveTime,
    to: NaiveTime,
}

impl Hours {
    /// Reads `18:00-21:30`.
    pub fn parse(text: &str) -> Option<Self> {
        let (from, to) = text.split_once('-')?;
        let time = |t: &str| NaiveTime::parse_from_str(t.trim(), "%H:%M").ok();
        let (from, to) = (time(from)?, time(to)?);
        (from != to).then_some(Self { from, to })
    }

    fn contain(self, now: NaiveTime) -> bool {
        if self.from < self.to {
            (self.from..self.to).contains(&now)
        } else {
            now >= self.from || now < self.to
        }
    }
}

/// What may move at a time of the day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rate {
    Unlimited,
    /// Bytes a second.
    Limited(u64),
    /// Nothing that can wait; what a person asks for goes at `max_rate`.
    Closed {
        until: NaiveTime,
        forced: u64,
    },
}

impl LinkConfig {
    fn rate(&self, now: NaiveTime) -> Rate {
        let limited = |rate| match rate {
            0 => Rate::Unlimited,
            rate => Rate::Limited(rate),
        };
        match self.quiet_hours.iter().find(|hours| hours.contain(now)) {
            None => limited(self.max_rate),
            Some(_) if self.quiet_rate > 0 => limited(self.quiet_rate),
            Some(hours) => Rate::Closed {
                until: hours.to,
                forced: self.max_rate,
            },
        }
    }
}

/// The budget of one link.
#[derive(Debug)]
pub struct Budget {
    state: Mutex<State>,
    /// Somebody left the line: the next one may be another now.
    moved: Notify,
}

#[derive(Debug)]
struct State {
    config: LinkConfig,
    /// Bytes spent that have not been earned yet.
    debt: f64,
    at: Instant,
    /// Those who wait, in the order in which they came.
    line: Vec<Waiting>,
    /// Of the next who comes.
    number: u64,
    /// Bytes that are for whoever waits longest, whatever the rank.
    share: f64,
}

/// One who waits to spend.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Waiting {
    number: u64,
    rank: Rank,
    bytes: f64,
}

impl State {
    fn new(config: LinkConfig) -> Self {
        Self {
            config,
            debt: 0.0,
            at: Instant::now(),
            line: vec![],
            number: 0,
            share: 0.0,
        }
    }

    fn enter(&mut self, rank: Rank, bytes: f64) -> u64 {
        self.number += 1;
        self.line.push(Waiting {
            number: self.number,
            rank,
            bytes,
        });
        self.number
    }

    /// Who goes next.
    fn next(&self) -> Option<u64> {
        let longest = self.line.first().filter(|w| w.bytes <= self.share);
        let best = || self.line.iter().min_by_key(|w| (w.rank, w.number));
        longest.or_else(best).map(|w| w.number)
    }

    /// One goes, and leaves the line.
    fn spend(&mut self, number: u64) {
        let longest = self.line.first().copied();
        let Some(at) = self.line.iter().position(|w| w.number == number) else {
            return;
        };
        let gone = self.line.remove(at);
        self.debt += gone.bytes;
        self.share = match longest {
            _ if self.line.is_empty() => 0.0,
            Some(longest) if longest.rank > gone.rank => self.share + gone.bytes * SHARE,
            _ if at == 0 => (self.share - gone.bytes).max(0.0),
            _ => self.share,
        };
    }

    /// Bytes a second now, after what was earned since the last look is taken off the debt.
    fn settle(&mut self) -> Option<u64> {
        let rate = match self.config.rate(Local::now().time()) {
            Rate::Unlimited | Rate::Closed { forced: 0, .. } => None,
            Rate::Limited(rate) | Rate::Closed { forced: rate, .. } => Some(rate),
        };
        self.earn(rate, self.at.elapsed());
        self.at = Instant::now();
        rate
    }

    fn earn(&mut self, rate: Option<u64>, time: Duration) {
        let earned = rate.map_or(f64::INFINITY, |rate| time.as_secs_f64() * rate as f64);
        self.debt = (self.debt - earned).max(0.0);
    }

    /// Until the debt is paid.
    fn wait(&self, rate: Option<u64>) -> Option<Duration> {
        let rate = rate.filter(|_| self.debt > 0.0)?;
        Some(Duration::from_secs_f64(self.debt / rate as f64))
    }
}

impl Budget {
    /// A budget without debts.
    pub fn new(config: LinkConfig) -> Self {
        Self {
            state: Mutex::new(State::new(config)),
            moved: Notify::new(),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes new settings into force.
    pub fn set(&self, config: LinkConfig) {
        self.state().config = config;
    }

    /// Waits until earlier bytes are paid for and it is our turn, then spends these.
    pub async fn pay(&self, bytes: usize) {
        let place = Place {
            budget: self,
            number: self.state().enter(order::rank(), bytes as f64),
        };
        loop {
            let moved = self.moved.notified();
            let wait = {
                let mut state = self.state();
                let rate = state.settle();
                let is_next = rate.is_none() || state.next() == Some(place.number);
                match state.wait(rate) {
                    None if is_next => {
                        state.spend(place.number);
                        return;
                    }
                    Some(wait) if is_next => wait,
                    _ => LOOK,
                }
            };
            tokio::select! {
                () = moved => {}
                () = tokio::time::sleep(wait.min(LOOK)) => {}
            }
        }
    }

    /// Most bytes of one command, at most `most`: about two seconds of the budget.
    pub fn command_bytes(&self, most: usize) -> usize {
        match self.state().settle() {
            None => most,
            Some(rate) => usize::try_from(rate.saturating_mul(2))
                .unwrap_or(most)
                .clamp(SMALLEST.min(most), most),
        }
    }

    /// Until when nothing moves by itself, if the hours are quiet and have no rate of their own.
    pub fn closed_until(&self) -> Option<NaiveTime> {
        match self.state().config.rate(Local::now().time()) {
            Rate::Closed { until, .. } => Some(until),
            _ => None,
        }
    }
}

/// A place in the line, left when dropped: whoever gives up waiting must not hold up the others.
struct Place<'a> {
    budget: &'a Budget,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.budget.state().line.retain(|w| w.number != self.number);
        self.budget.moved.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> NaiveTime {
        NaiveTime::parse_from_str(text, "%H:%M").unwrap()
    }

    fn config(max_rate: u64, hours: &[&str], quiet_rate: u64) -> LinkConfig {
        LinkConfig {
            max_rate,
            quiet_hours: hours.iter().map(|h| Hours::parse(h).unwrap()).collect(),
            quiet_rate,
            ..LinkConfig::default()
        }
    }

    #[test]
    fn hours_may_pass_midnight() {
        let night = Hours::parse("22:30 - 06:00").unwrap();
        assert!(night.contain(at("23:00")) && night.contain(at("05:59")));
        assert!(!night.contain(at("06:00")) && !night.contain(at("22:29")));
        for bad in ["", "8-9", "08:00", "08:00-08:00", "25:00-26:00"] {
            assert_eq!(Hours::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_hour_decides_the_rate() {
        let closed = config(500, &["18:00-21:00"], 0);
        assert_eq!(closed.rate(at("17:59")), Rate::Limited(500));
        let (until, forced) = (at("21:00"), 500);
        assert_eq!(closed.rate(at("18:00")), Rate::Closed { until, forced });
        let slow = config(0, &["18:00-21:00"], 100);
        assert_eq!(slow.rate(at("21:00")), Rate::Unlimited);
        assert_eq!(slow.rate(at("20:00")), Rate::Limited(100));
    }

    #[test]
    fn what_is_spent_is_earned_before_the_next() {
        let mut state = State::new(LinkConfig::default());
        state.debt = 3000.0;
        assert_eq!(state.wait(None), None);
        assert_eq!(state.wait(Some(1000)), Some(Duration::from_secs(3)));
        state.earn(Some(1000), Duration::from_secs(1));
        assert_eq!(state.wait(Some(1000)), Some(Duration::from_secs(2)));
        // Time in which nothing was to be sent is no credit.
        state.earn(Some(1000), Duration::from_secs(60));
        assert_eq!((state.wait(Some(1000)), state.debt), (None, 0.0));
    }

    #[tokio::test]
    async fn commands_fit_the_rate_and_the_debt_is_kept() {
        let budget = Budget::new(config(100 << 10, &[], 0));
        assert_eq!(budget.command_bytes(4 << 20), 200 << 10);
        budget.pay(1 << 30).await;
        assert!(budget.state().wait(Some(1)).is_some());
        budget.set(config(1, &[], 0));
        assert_eq!(budget.command_bytes(4 << 20), SMALLEST);
        budget.set(LinkConfig::default());
        budget.pay(1).await;
        assert_eq!(budget.command_bytes(4 << 20), 4 << 20);
    }

    #[test]
    fn the_best_rank_goes_first_and_of_equals_the_first() {
        let mut state = State::new(LinkConfig::default());
        let came = [3, 1, 0, 1, 0].map(|rank| state.enter(rank, 1000.0));
        for place in [2, 4, 1, 3, 0] {
            assert_eq!(state.next(), Some(came[place]));
            state.spend(came[place]);
        }
        assert_eq!((state.next(), state.debt, state.share), (None, 5000.0, 0.0));
    }

    #[test]
    fn an_eighth_is_for_those_whom_better_ones_overtake() {
        let mut state = State::new(LinkConfig::default());
        let mut last = state.enter(7, 1000.0);
        let mut went = 0;
        for _ in 0..81 {
            let better = state.enter(0, 1000.0);
            let next = state.next().unwrap();
            state.spend(next);
            if next == last {
                went += 1;
                last = state.enter(7, 1000.0);
            }
            // Whoever gives up leaves the line.
            state.line.retain(|w| w.number != better);
        }
        assert_eq!(went, 81 / 9);
    }

    #[tokio::test]
    async fn who_gives_up_waiting_holds_up_nobody() {
        let budget = Budget::new(config(1024, &[], 0));
        budget.pay(1 << 20).await;
        let gives_up = tokio::time::timeout(Duration::from_millis(10), budget.pay(1));
        assert!(gives_up.await.is_err());
        assert_eq!(budget.state().line, []);
        budget.set(LinkConfig::default());
        order::at(5, budget.pay(1)).await;
    }
}

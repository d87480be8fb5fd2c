//! Retry delays: exponential, with jitter, capped, never giving up (R20).
//!
//! Only the delay sequence of the `backoff` crate is used, with its `max_elapsed_time` off (its
//! default gives up after 15 minutes). Replacing the crate means replacing this file.

use std::time::Duration;

use backoff::ExponentialBackoff;
use backoff::backoff::Backoff as _;

use crate::config::RetryConfig;

/// A sequence of delays.
pub struct Retry {
    sequence: ExponentialBackoff,
    max: Duration,
}

impl Retry {
    /// Delays from `initial` doubling to `max`, each spread by ± 30 %.
    pub fn new(config: &RetryConfig) -> Self {
        Self::between(config.initial, config.max)
    }

    /// The same from two durations.
    pub fn between(initial: Duration, max: Duration) -> Self {
        let mut sequence = ExponentialBackoff {
            current_interval: initial,
            initial_interval: initial,
            randomization_factor: 0.3,
            multiplier: 2.0,
            max_interval: max,
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        };
        sequence.reset();
        Self { sequence, max }
    }

    /// The next delay. The crate caps before it spreads, so the cap is applied again here.
    pub fn next_delay(&mut self) -> Duration {
        self.sequence
            .next_backoff()
            .unwrap_or(self.max)
            .min(self.max)
    }

    /// Starts over after a success.
    pub fn reset(&mut self) {
        self.sequence.reset();
    }
}

/// The delay before try number `attempt` (from 1) of one document.
pub fn delay_of_attempt(config: &RetryConfig, attempt: u32) -> Duration {
    config
        .initial
        .saturating_mul(2_u32.saturating_pow(attempt.saturating_sub(1).min(20)))
        .min(config.max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r20_delays_grow_to_the_cap_and_never_end() {
        let max = Duration::from_secs(5);
        let mut retry = Retry::between(Duration::from_millis(100), max);
        let delays: Vec<_> = (0..10_000).map(|_| retry.next_delay()).collect();
        assert!(delays[0] <= Duration::from_millis(130) && delays[0] >= Duration::from_millis(70));
        assert!(delays.iter().all(|d| *d <= max));
        assert!(delays[20..].iter().all(|d| *d >= max.mul_f64(0.69)));
        retry.reset();
        assert!(retry.next_delay() <= Duration::from_millis(130));
    }
}

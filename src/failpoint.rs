//! Test-only crash points and mutations; in a release build nothing of it is there.
//!
//! `SANGAM_FAILPOINT=name:probability[,name:probability]` aborts the process at named points;
//! `SANGAM_SUSPEND=name:FILE` suspends it there when the file appears.
//! `SANGAM_MUTATION=name` takes one rule of the contract away, so that the tests can be seen to fail.

#[cfg(debug_assertions)]
use std::collections::HashMap;

/// The points that are armed.
#[derive(Debug, Default)]
pub struct Failpoints {
    #[cfg(debug_assertions)]
    points: HashMap<String, f64>,
    #[cfg(debug_assertions)]
    mutation: String,
    /// Where to suspend the process, and the file whose presence asks for it.
    #[cfg(debug_assertions)]
    suspend: Option<(String, std::path::PathBuf)>,
}

impl Failpoints {
    /// Reads the environment; in a release build, nothing.
    pub fn from_env() -> Self {
        #[cfg(debug_assertions)]
        {
            let points = std::env::var("SANGAM_FAILPOINT").unwrap_or_default();
            let points = points
                .split(',')
                .filter_map(|p| p.split_once(':'))
                .filter_map(|(name, chance)| {
                    Some((name.trim().to_owned(), chance.trim().parse().ok()?))
                })
                .collect();
            Self {
                points,
                mutation: std::env::var("SANGAM_MUTATION").unwrap_or_default(),
                suspend: std::env::var("SANGAM_SUSPEND")
                    .ok()
                    .and_then(|s| Some((s.split_once(':')?.0.into(), s.split_once(':')?.1.into()))),
            }
        }
        #[cfg(not(debug_assertions))]
        Self::default()
    }

    /// Ends the process here, with the armed probability, as `kill -9` would.
    pub fn crash(&self, _name: &str) {
        #[cfg(debug_assertions)]
        if let Some(chance) = self.points.get(_name)
            && rand::random::<f64>() < *chance
        {
            eprintln!("failpoint {_name}");
            std::process::abort();
        }
    }

    /// Suspends the process here, as SIGSTOP would, once for each time that the file is put there.
    pub fn suspend(&self, _name: &str) {
        #[cfg(debug_assertions)]
        if let Some((name, file)) = &self.suspend
            && name == _name
            && std::fs::remove_file(file).is_ok()
        {
            let me = rustix::process::getpid();
            if let Err(error) = rustix::process::kill_process(me, rustix::process::Signal::STOP) {
                eprintln!("failpoint {_name}: {error}");
            }
            // Another thread may be the one that takes the signal; this one must not get ahead of it.
            std::thread::sleep(std::time::Duration::from_millis(300));
        }
    }

    /// Whether this rule is taken away.
    pub fn mutated(&self, _name: &str) -> bool {
        #[cfg(debug_assertions)]
        return self.mutation == _name;
        #[cfg(not(debug_assertions))]
        false
    }
}

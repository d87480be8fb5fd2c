//! What a seed says: the whole history but for what the processes make of it.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::check::Side;
use super::faults::Kind;
use super::writers::PARTS;

/// Which servers there are; each fits on two cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Profile {
    /// A server on each side, disks that fill, oplogs that roll over.
    Pair,
    /// Three servers on one side: elections, rollback.
    Replica,
    /// Three sites on one remote.
    Sites,
    /// Three servers on both sides.
    Replicas,
    /// Three local servers with a daemon each, of which one works.
    Ha,
}

/// Whatever is not a fault or a writer and can be left out to find the smallest history that fails.
const EXTRAS: [&str; 6] = [
    "wrong_clocks",
    "hasty",
    "third_site",
    "pull",
    "restore",
    "failpoints",
];

/// One history.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    pub seed: u64,
    pub profile: Profile,
    /// Servers of each local cluster, and of the remote one.
    pub local_nodes: usize,
    pub remote_nodes: usize,
    pub sites: usize,
    /// Daemons at each site.
    pub peers: usize,
    pub oplog_mb: u32,
    pub policy: &'static str,
    pub stamp: bool,
    /// Whether daemons that run are left alone at the end, or started again.
    pub restart: bool,
    /// How long things go wrong.
    pub chaos: Duration,
    /// Seconds that each process's clock is off: of the daemons, then of the servers.
    pub clocks: Vec<Option<i64>>,
    /// Writers whose writes only the primary acknowledges.
    pub hasty: bool,
    /// Whether remote changes come by its stream.
    pub follow: bool,
    /// The side that is put back to a backup at the end.
    pub restored: Option<Side>,
    pub failpoints: String,
    /// Parts and faults that are left out.
    pub without: BTreeSet<String>,
}

impl Plan {
    /// What that seed says.
    pub fn new(seed: u64, profile: Profile, without: &BTreeSet<String>, chaos: Duration) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ (profile as u64 + 1) << 56);
        let policies = ["remote_wins", "local_wins", "newest_wins", "manual"];
        let left = |name: &str| without.contains(name);
        let three_local = rng.random_bool(0.6);
        let (local_nodes, remote_nodes) = match profile {
            Profile::Replica if three_local => (3, 1),
            Profile::Replica => (1, 3),
            Profile::Replicas => (3, 3),
            Profile::Ha => (3, 1),
            _ => (1, 1),
        };
        let sites = match profile {
            Profile::Sites if left("third_site") => 2,
            Profile::Sites => 3,
            _ => 1,
        };
        let policy = policies[rng.random_range(0..policies.len())];
        let stamp = rng.random_bool(0.5);
        let restart = rng.random_bool(0.5);
        let wrong = rng.random_bool(0.6);
        let clocks = (0..8).map(|_| offset(&mut rng)).collect();
        let points = [
            "before_write",
            "after_write_before_ack",
            "after_base",
            "enq_before_token",
            "after_token",
        ];
        let armed = points.iter().filter(|_| rng.random_bool(0.5));
        let armed: Vec<String> = armed.map(|name| format!("{name}:0.003")).collect();
        // Drawn in any case: what is left out must not change the rest.
        let follow = rng.random_bool(0.75) || left("pull");
        let back = rng.random_bool(0.4) && profile == Profile::Pair && !left("restore");
        let side = [Side::Local(0), Side::Remote][rng.random_range(0..2)];
        Self {
            seed,
            profile,
            local_nodes,
            remote_nodes,
            sites,
            peers: if profile == Profile::Ha { 3 } else { 1 },
            oplog_mb: 4,
            policy,
            stamp,
            restart,
            chaos,
            // Members of one set whose clocks are days apart are not what a lease can stand.
            clocks: if wrong && profile != Profile::Ha && !left("wrong_clocks") {
                clocks
            } else {
                vec![]
            },
            hasty: !left("hasty") && local_nodes + remote_nodes > 2,
            follow,
            restored: back.then_some(side),
            failpoints: match left("failpoints") {
                true => String::new(),
                false => armed.join(","),
            },
            without: without.clone(),
        }
    }

    /// A source of chance for one part of the history, which no other part disturbs.
    pub fn rng(&self, part: u64) -> StdRng {
        StdRng::seed_from_u64(self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ part)
    }

    /// Whether a kind of fault strikes.
    pub fn has(&self, kind: Kind) -> bool {
        !self.without.contains(kind.name())
    }

    /// The same for so long, without these.
    pub fn smaller(&self, without: &BTreeSet<String>, chaos: Duration) -> Self {
        Self::new(self.seed, self.profile, without, chaos)
    }

    /// Parts that are no faults and no writers, and without which this is the same.
    pub fn idle(&self) -> impl Iterator<Item = &'static str> {
        EXTRAS.into_iter().filter(|part| {
            let mut without = self.without.clone();
            without.insert((*part).into());
            let mut other = self.smaller(&without, self.chaos);
            other.without.clone_from(&self.without);
            other == *self
        })
    }

    /// `7 pair`.
    pub fn name(&self) -> String {
        format!("{} {:?}", self.seed, self.profile).to_lowercase()
    }

    /// What there still is of [`parts`].
    pub fn left(&self) -> Vec<&'static str> {
        let all = parts().into_iter();
        all.filter(|part| !self.without.contains(*part)).collect()
    }

    /// The command that runs this again.
    pub fn command(&self) -> String {
        let profile = format!("{:?}", self.profile).to_lowercase();
        let release = if cfg!(debug_assertions) {
            ""
        } else {
            " --release"
        };
        let mutation = std::env::var("SANGAM_MUTATION").unwrap_or_default();
        let mutation = match &mutation[..] {
            "" => String::new(),
            mutation => format!("SANGAM_MUTATION={mutation} "),
        };
        let mut line = format!(
            "{mutation}cargo run{release} --example storm -- --seed {} --profile {profile} --histories 1 --chaos {}",
            self.seed,
            self.chaos.as_secs()
        );
        let left = self.left();
        if self.without.len() > left.len() && !left.is_empty() {
            line += &format!(" --only {}", left.join(","));
        } else if !self.without.is_empty() {
            let names: Vec<&str> = self.without.iter().map(String::as_str).collect();
            line += &format!(" --without {}", names.join(","));
        }
        line
    }
}

/// Everything that `--without` can leave out.
pub fn parts() -> Vec<&'static str> {
    let kinds = Kind::ALL.iter().map(|kind| kind.name());
    kinds.chain(PARTS).chain(EXTRAS).collect()
}

/// Minutes to days, either way; some clocks are right.
fn offset(rng: &mut StdRng) -> Option<i64> {
    let most = [0, 300, 7_200, 4 * 86_400][rng.random_range(0..4)];
    (most > 0).then(|| rng.random_range(-most..=most))
}

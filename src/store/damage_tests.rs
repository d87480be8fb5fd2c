//! Any damage to the state file: it opens, or is put aside and named, or says what is wrong.

use bson::doc;
use proptest::prelude::*;

use super::claim::{Claim, claim};
use super::queue::{self, Change};
use super::*;
use crate::decide::Side;
use crate::key::{Id, Key};

/// What happens to a file.
#[derive(Clone, Debug)]
enum Damage {
    /// One byte is another.
    Flip(usize, u8),
    /// It ends early.
    Cut(usize),
    /// A page's worth is zero.
    Zero(usize),
    /// A page's worth is something else.
    Noise(usize, u8),
    Gone,
}

fn damage(bytes: &mut Vec<u8>, how: &Damage) {
    let n = bytes.len().max(1);
    let mut page = |at: usize, with: &dyn Fn(usize) -> u8| {
        let at = at % n;
        for (i, byte) in bytes.iter_mut().enumerate().skip(at).take(4096) {
            *byte = with(i);
        }
    };
    match *how {
        Damage::Flip(at, with) => {
            let at = at % n;
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= with;
            }
        }
        Damage::Cut(at) => bytes.truncate(at % n),
        Damage::Zero(at) => page(at, &|_| 0),
        Damage::Noise(at, salt) => page(at, &|i| (i as u8).wrapping_mul(31) ^ salt),
        Damage::Gone => bytes.clear(),
    }
}

/// The files of a state that has been used, with a log that is not yet folded in.
fn used() -> &'static [(&'static str, Vec<u8>)] {
    static FILES: std::sync::OnceLock<Vec<(&str, Vec<u8>)>> = std::sync::OnceLock::new();
    FILES.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path()).unwrap();
            store.namespace("db", "c").await.unwrap();
            for round in 0..6 {
                store.call(move |c| fill(c, round)).await.unwrap();
                if round == 3 {
                    let fold = |c: &Connection| c.query_row("PRAGMA page_count", [], |_| Ok(()));
                    store.call(fold).await.unwrap();
                    let second = Connection::open(dir.path().join("sangam.db")).unwrap();
                    let _ = second.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
                }
            }
            ["sangam.db", "sangam.db-wal"]
                .map(|name| (name, std::fs::read(dir.path().join(name)).unwrap()))
                .into()
        })
    })
}

fn fill(c: &Connection, round: i32) -> rusqlite::Result<()> {
    let changes: Vec<Change> = (0..60).map(|n| change(round * 50 + n)).collect();
    queue::enqueue(c, Side::Local, &changes, 5)?;
    for change in &changes {
        let content = doc! {"_id": 1, "text": "x".repeat(90), "round": round}.to_vec();
        base::put(c, &change.key, content.ok().as_deref())?;
    }
    set_meta(c, "token", vec![7_u8; 40])
}

fn change(n: i32) -> Change {
    let id = Id::of(&doc! {"_id": n}.to_vec().unwrap()).unwrap();
    Change {
        key: Key::new(1, &id),
        id,
        hint: None,
    }
}

/// Reads and writes all that the daemon would.
fn work(c: &Connection) -> rusqlite::Result<()> {
    let what = Claim {
        of: Side::Local,
        after: 0,
        limit: 1000,
        now: 10,
        only: vec![],
        never: Default::default(),
        sync_fields: vec![],
        behind: Default::default(),
        sent: Default::default(),
        longest: i64::MAX,
    };
    let (works, _) = claim(c, &what, &mut Default::default())?;
    for work in works {
        if let Some(row) = work.outbox {
            queue::remove(c, Side::Local, &work.key, row.seq)?;
        }
    }
    fill(c, 9)?;
    queue::counts(c, Side::Local)?;
    lanes::list(c, 10, &[])?;
    Ok(())
}

/// After at most one more start there is a store that works; anything else is a clear refusal.
async fn survive(dir: &Path) {
    for start in 0..2 {
        let store = match Store::open(dir) {
            Ok(store) => store,
            Err(StoreError::Newer { .. } | StoreError::Unknown { .. }) => return,
            Err(StoreError::Locked(_)) => {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            Err(error) => panic!("start {start}: {error}"),
        };
        match store.call(work).await {
            Ok(()) => return,
            Err(error) => assert!(error.is_corrupt(), "start {start}: {error}"),
        }
        // What a service manager does: another start, by which the damage must be gone.
        let next = dir.with_extension("next");
        std::fs::create_dir(&next).unwrap();
        for file in std::fs::read_dir(dir).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), next.join(file.file_name())).unwrap();
        }
        drop(store);
        let store = Store::open(&next).unwrap();
        assert!(
            store.put_aside().is_some(),
            "still damaged, and not put aside"
        );
        store.call(work).await.unwrap();
        return;
    }
}

fn damages() -> impl Strategy<Value = Damage> {
    prop_oneof![
        4 => (any::<usize>(), 1..=255_u8).prop_map(|(at, with)| Damage::Flip(at, with)),
        // The first page holds format and tables.
        3 => (0..4096_usize, 1..=255_u8).prop_map(|(at, with)| Damage::Flip(at, with)),
        2 => any::<usize>().prop_map(Damage::Cut),
        2 => any::<usize>().prop_map(Damage::Zero),
        2 => (any::<usize>(), any::<u8>()).prop_map(|(at, salt)| Damage::Noise(at, salt)),
        1 => Just(Damage::Gone),
    ]
}

#[test]
fn a_damaged_name_in_a_definition_is_survived() {
    // (SQLite's own check does not look at them.)
    let (name, bytes) = &used()[0];
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    for word in ["OLD.key", "attempts", "outbox_ready", "ON CONFLICT"] {
        let places = bytes.windows(word.len()).enumerate();
        let places: Vec<usize> = (places.filter(|(_, w)| *w == word.as_bytes()))
            .map(|(at, _)| at)
            .collect();
        assert!(!places.is_empty(), "{word}");
        for at in places {
            let root = tempfile::tempdir().unwrap();
            let dir = root.path().join("state");
            std::fs::create_dir(&dir).unwrap();
            let mut bytes = bytes.clone();
            damage(&mut bytes, &Damage::Flip(at, 0x80));
            std::fs::write(dir.join(name), bytes).unwrap();
            runtime.block_on(survive(&dir));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn any_damage_is_survived_or_named(
        file in 0..2_usize,
        damages in proptest::collection::vec(damages(), 1..3),
    ) {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("state");
        std::fs::create_dir(&dir).unwrap();
        for (i, (name, bytes)) in used().iter().enumerate() {
            let mut bytes = bytes.clone();
            if i == file {
                for how in &damages {
                    damage(&mut bytes, how);
                }
            }
            std::fs::write(dir.join(name), bytes).unwrap();
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(survive(&dir));
    }
}

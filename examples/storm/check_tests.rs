//! The checker must be able to fail: one hand-made state for each problem.

use super::*;
use mongodb::bson::doc;

fn put(seen: &mut Observed, document: Document) {
    for local in &mut seen.locals {
        put_one(local, document.clone());
    }
    put_one(&mut seen.remote, document);
}

fn put_one(side: &mut BTreeMap<String, (Vec<u8>, Document)>, document: Document) {
    let key = document.get_str("_id").unwrap().to_owned();
    side.insert(key, (document.to_vec().unwrap(), document));
}

fn good() -> (Ledger, Observed) {
    let mut ledger = Ledger::default();
    let mut seen = Observed {
        locals: vec![Documents::new(); 2],
        ..Observed::default()
    };
    ledger.acknowledge("L1", Side::Local(0), Some(7));
    ledger.acknowledge("R1", Side::Remote, None);
    ledger.acknowledge("C1", Side::Local(0), Some(1));
    ledger.acknowledge("C1", Side::Remote, Some(2));
    ledger.fields.insert(("B1".into(), Side::Local(0)), vec![3]);
    ledger
        .fields
        .insert(("B1".into(), Side::Remote), vec![4, 5]);
    ledger.swapped = ["a", "b"].map(String::from).into();
    put(&mut seen, doc! {"_id": "L1", "v": 7_i64});
    put(&mut seen, doc! {"_id": "C1", "v": 2_i64});
    put(&mut seen, doc! {"_id": "B1", "l0": 3_i64, "r": 5_i64});
    ledger.chains.insert("K1".into(), [1, 2].into());
    put(&mut seen, doc! {"_id": "K1", "h": [1_i64, 2_i64]});
    ledger.counts.insert("N1".into(), (5, 2));
    ledger.items.insert(("N1".into(), 8), vec![true]);
    ledger.items.insert(("N1".into(), 9), vec![false]);
    put(&mut seen, doc! {"_id": "N1", "sum": 6_i64, "set": [8_i64]});
    put(&mut seen, doc! {"_id": "U1", "u": "b"});
    put(&mut seen, doc! {"_id": "U2", "u": "a"});
    (ledger, seen)
}

/// Applies one change to the good state and returns the problems.
fn after(change: impl FnOnce(&mut Observed)) -> Vec<Problem> {
    let (ledger, mut seen) = good();
    change(&mut seen);
    check(&ledger, &seen)
}

fn conflict(key: &str, open: bool) -> Conflict {
    Conflict {
        key: key.into(),
        open,
        ..Conflict::default()
    }
}

#[test]
fn a_good_state_has_no_problems() {
    assert_eq!(after(|_| {}), []);
}

#[test]
fn bytes_decide_about_divergence() {
    let found = after(|s| put_one(&mut s.locals[1], doc! {"_id": "C1", "v": 2_i32}));
    assert!(matches!(&found[..], [Problem::Diverged { key, .. }] if key == "C1"));
}

#[test]
fn an_open_conflict_excuses_a_shared_key_and_no_other() {
    let diverge = |key: &str, open: bool| {
        let document = doc! {"_id": key, "v": 7_i64, "more": 1};
        after(|s| {
            put_one(&mut s.remote, document);
            s.conflicts.push(conflict(key, open));
        })
    };
    assert_eq!(diverge("C1", true), []);
    assert!(matches!(
        &diverge("C1", false)[..],
        [Problem::Diverged { .. }, Problem::Diverged { .. }]
    ));
    let own = diverge("L1", true);
    assert!(matches!(
        &own[..],
        [
            Problem::Diverged { .. },
            Problem::Diverged { .. },
            Problem::FalseConflict { .. }
        ]
    ));
}

#[test]
fn a_lost_write_and_a_resurrected_delete() {
    let found = after(|s| put(s, doc! {"_id": "L1", "v": 6_i64}));
    assert!(matches!(&found[..], [Problem::Lost { found: Some(6), .. }]));
    let found = after(|s| put(s, doc! {"_id": "R1", "v": 6_i64}));
    assert!(matches!(&found[..], [Problem::Resurrected { .. }]));
}

#[test]
fn a_lost_field() {
    let found = after(|s| put(s, doc! {"_id": "B1", "l0": 2_i64, "r": 4_i64}));
    assert!(matches!(
        &found[..],
        [Problem::LostField {
            side: Side::Local(0),
            ..
        }]
    ));
}

#[test]
fn a_contested_key_needs_a_last_write_or_a_conflict() {
    let change = |s: &mut Observed| put(s, doc! {"_id": "C1", "v": 9_i64});
    assert!(matches!(&after(change)[..], [Problem::Contested { .. }]));
    let excused = after(|s| {
        change(s);
        s.conflicts.push(conflict("C1", false));
    });
    assert_eq!(excused, []);
}

#[test]
fn a_broken_swap_and_a_stuck_queue() {
    let found = after(|s| put(s, doc! {"_id": "U1", "u": "tmp"}));
    assert!(matches!(&found[..], [Problem::Swaps { .. }]));
    let found = after(|s| s.outbox = 1);
    assert!(matches!(&found[..], [Problem::Stuck { .. }]));
}

#[test]
fn an_unacknowledged_write_may_or_may_not_have_happened() {
    let (mut ledger, mut seen) = good();
    let before = ledger.attempt("L1", Side::Local(0), Some(8));
    assert_eq!(check(&ledger, &seen), []);
    put(&mut seen, doc! {"_id": "L1", "v": 8_i64});
    assert_eq!(check(&ledger, &seen), []);
    ledger.revert("L1", Side::Local(0), before);
    assert!(matches!(&check(&ledger, &seen)[..], [Problem::Lost { .. }]));
}

#[test]
fn a_chained_write_is_in_the_document_or_on_record() {
    let overwrite = |s: &mut Observed| put(s, doc! {"_id": "K1", "h": [1_i64, 3_i64]});
    let found = after(overwrite);
    assert!(matches!(&found[..], [Problem::Unkept { missing, .. }] if *missing == [2]));
    let record = |local: [i64; 2], remote: &[i64]| Conflict {
        local: Some(doc! {"_id": "K1", "h": local.to_vec()}),
        remote: Some(doc! {"_id": "K1", "h": remote.to_vec()}),
        ..conflict("K1", false)
    };
    let kept = after(|s| {
        overwrite(s);
        s.conflicts.push(record([1, 2], &[1, 3]));
    });
    assert_eq!(kept, []);
    let found = after(|s| s.conflicts.push(record([1, 2], &[1])));
    assert!(matches!(&found[..], [Problem::FalseChainConflict { .. }]));
}

#[test]
fn counts_and_sets_have_what_all_sides_put_in() {
    for (sum, set) in [(4_i64, vec![8_i64]), (8, vec![8])] {
        let found = after(|s| put(s, doc! {"_id": "N1", "sum": sum, "set": set}));
        assert!(matches!(
            &found[..],
            [Problem::Miscounted {
                least: 5,
                most: 7,
                ..
            }]
        ));
    }
    for set in [vec![], vec![8_i64, 8], vec![8, 9]] {
        let found = after(|s| put(s, doc! {"_id": "N1", "sum": 5_i64, "set": set}));
        assert!(
            matches!(&found[..], [Problem::WrongSet { .. }]),
            "{found:?}"
        );
    }
    let mut ledger = Ledger::default();
    ledger.may_count("N1", 3);
    ledger.may_count("N1", 4);
    ledger.counted("N1", 3, true);
    assert_eq!(ledger.counts["N1"], (3, 4));
    ledger.counted("N1", 4, false);
    assert_eq!(ledger.counts["N1"], (3, 0));
}

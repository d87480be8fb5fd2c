//! The decision by property: total, deterministic, mirrored, idempotent, convergent.

use super::*;
use bson::{Document, doc};
use proptest::prelude::*;

fn rules(policy: Policy) -> Rules<'static> {
    Rules {
        policy,
        updated_at: "updatedAt",
        skew_ms: 0,
        first_sync: false,
        fields: None,
        base_may_lag: false,
    }
}

fn b(d: Document) -> Vec<u8> {
    d.to_vec().unwrap()
}

fn content() -> impl Strategy<Value = Option<Vec<u8>>> {
    let field = (
        prop::sample::select(vec!["a", "b", "c", "updatedAt"]),
        0..3_i64,
    );
    prop::option::weighted(
        0.85,
        prop::collection::vec(field, 0..5).prop_map(|fields| {
            let mut d = doc! {"_id": 1};
            for (name, value) in fields {
                if name == "updatedAt" {
                    d.insert(name, bson::DateTime::from_millis(value));
                } else {
                    d.insert(name, value);
                }
            }
            b(d)
        }),
    )
}

fn policy() -> impl Strategy<Value = Policy> {
    prop::sample::select(vec![
        Policy::Manual,
        Policy::NewestWins,
        Policy::LocalWins,
        Policy::RemoteWins,
    ])
}

fn mirror(p: Policy) -> Policy {
    match p {
        Policy::LocalWins => Policy::RemoteWins,
        Policy::RemoteWins => Policy::LocalWins,
        p => p,
    }
}

/// What the target is as content.
fn outcome(t: &Target, local: &Option<Vec<u8>>, remote: &Option<Vec<u8>>) -> Option<Vec<u8>> {
    match t {
        Target::Local => local.clone(),
        Target::Remote => remote.clone(),
        Target::Merged(m) => Some(m.clone()),
    }
}

fn as_map(doc: &Option<Vec<u8>>) -> Option<std::collections::BTreeMap<Vec<u8>, Vec<u8>>> {
    doc.as_ref().map(|d| {
        raw::elements(d)
            .flatten()
            .map(|e| (e.name.to_vec(), e.whole.to_vec()))
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn convergent_and_idempotent(local in content(), base in content(), remote in content(), p in policy()) {
        let view = View { local: local.as_deref(), base: base.as_deref(), remote: remote.as_deref() };
        let decision = decide(view, rules(p));
        prop_assert_eq!(&decision, &decide(view, rules(p)), "deterministic");
        match decision {
            Decision::Agree => prop_assert_eq!(local, remote),
            Decision::Hold(clash) => {
                prop_assert_ne!(p, Policy::LocalWins);
                prop_assert_ne!(p, Policy::RemoteWins);
                prop_assert!(matches!(clash.kind, Kind::BothModified | Kind::InsertInsert));
            }
            Decision::Settle(target, _) => {
                let t = outcome(&target, &local, &remote);
                // Carried out in either order, and looked at again between the two writes, it ends equal.
                // Remote first: base becomes the local content, which makes the rest a plain pull.
                if t != remote && t != local {
                    let again = decide(View { local: local.as_deref(), base: local.as_deref(), remote: t.as_deref() }, rules(p));
                    prop_assert_eq!(again, Decision::Settle(Target::Remote, None));
                    let again = decide(View { local: t.as_deref(), base: remote.as_deref(), remote: remote.as_deref() }, rules(p));
                    prop_assert_eq!(again, Decision::Settle(Target::Local, None));
                }
                let done = decide(View { local: t.as_deref(), base: t.as_deref(), remote: t.as_deref() }, rules(p));
                prop_assert_eq!(done, Decision::Agree);
            }
        }
    }

    #[test]
    fn swapping_the_sides_swaps_the_answer(local in content(), base in content(), remote in content(), p in policy()) {
        let there = decide(View { local: local.as_deref(), base: base.as_deref(), remote: remote.as_deref() }, rules(p));
        let back = decide(View { local: remote.as_deref(), base: base.as_deref(), remote: local.as_deref() }, rules(mirror(p)));
        match (there, back) {
            (Decision::Agree, Decision::Agree) => {}
            (Decision::Hold(a), Decision::Hold(b)) => {
                let sort = |mut c: Clash| { c.fields.sort(); c };
                prop_assert_eq!(sort(a), sort(b));
            }
            (Decision::Settle(a, ca), Decision::Settle(b, cb)) => {
                prop_assert_eq!(ca.map(|c| c.kind), cb.as_ref().map(|c| c.kind));
                // A tie of `newest_wins` goes to the remote from either point of view; the order of
                // fields in a merge follows the remote. Everything else is the same content.
                if !(p == Policy::NewestWins && cb.is_some()) {
                    prop_assert_eq!(as_map(&outcome(&a, &local, &remote)), as_map(&outcome(&b, &remote, &local)));
                }
            }
            (a, b) => prop_assert!(false, "{:?} against {:?}", a, b),
        }
    }

    #[test]
    fn no_change_of_one_side_alone_is_lost(local in content(), base in content(), remote in content(), p in policy()) {
        let (Some(l), Some(r)) = (&local, &remote) else { return Ok(()) };
        let view = View { local: Some(l), base: base.as_deref(), remote: Some(r) };
        let Decision::Settle(target, _) = decide(view, rules(p)) else { return Ok(()) };
        let t = outcome(&target, &local, &remote).unwrap();
        let nothing = b(doc! {});
        let base = base.as_deref().unwrap_or(&nothing);
        for name in ["a", "b", "c"] {
            let at = |d: &[u8]| raw::get(d, name.as_bytes()).map(|e| e.whole.to_vec());
            if at(l) == at(base) { prop_assert_eq!(at(&t), at(r)); }
            if at(r) == at(base) { prop_assert_eq!(at(&t), at(l)); }
        }
    }
}

#[test]
fn the_table_of_the_design() {
    let (b0, l, r) = (
        b(doc! {"_id": 1, "x": 0, "y": 0}),
        b(doc! {"_id": 1, "x": 1, "y": 0}),
        b(doc! {"_id": 1, "x": 0, "y": 2}),
    );
    let d = |local: Option<&Vec<u8>>, base: Option<&Vec<u8>>, remote: Option<&Vec<u8>>| {
        let v = View {
            local: local.map(Vec::as_slice),
            base: base.map(Vec::as_slice),
            remote: remote.map(Vec::as_slice),
        };
        decide(v, rules(Policy::Manual))
    };
    assert_eq!(d(Some(&b0), Some(&b0), Some(&b0)), Decision::Agree);
    assert_eq!(
        d(Some(&l), Some(&b0), Some(&b0)),
        Decision::Settle(Target::Local, None)
    );
    assert_eq!(
        d(Some(&b0), Some(&b0), Some(&r)),
        Decision::Settle(Target::Remote, None)
    );
    assert_eq!(d(Some(&l), Some(&b0), Some(&l)), Decision::Agree);
    let merged = b(doc! {"_id": 1, "x": 1, "y": 2});
    assert_eq!(
        d(Some(&l), Some(&b0), Some(&r)),
        Decision::Settle(Target::Merged(merged), None)
    );
    let other = b(doc! {"_id": 1, "x": 9, "y": 0});
    let clash = Clash {
        kind: Kind::BothModified,
        fields: vec!["x".into()],
    };
    assert_eq!(d(Some(&l), Some(&b0), Some(&other)), Decision::Hold(clash));
    let clash = Clash {
        kind: Kind::DeleteUpdate,
        fields: vec![],
    };
    assert_eq!(
        d(None, Some(&b0), Some(&r)),
        Decision::Settle(Target::Remote, Some(clash.clone()))
    );
    assert_eq!(
        d(Some(&l), Some(&b0), None),
        Decision::Settle(Target::Local, Some(clash))
    );
    assert_eq!(
        d(None, Some(&b0), Some(&b0)),
        Decision::Settle(Target::Local, None)
    );
    let clash = Clash {
        kind: Kind::InsertInsert,
        fields: vec!["x".into()],
    };
    assert_eq!(d(Some(&l), None, Some(&other)), Decision::Hold(clash));
}

#[test]
fn r17_newest_wins_corrects_the_measured_skew() {
    let at =
        |ms: i64, x: i32| b(doc! {"_id": 1, "x": x, "updatedAt": bson::DateTime::from_millis(ms)});
    let (l, base, r) = (at(10_000, 1), at(0, 0), at(12_000, 2));
    let v = View {
        local: Some(&l),
        base: Some(&base),
        remote: Some(&r),
    };
    let newest = |skew_ms| Rules {
        skew_ms,
        ..rules(Policy::NewestWins)
    };
    let side = |d: Decision| match d {
        Decision::Settle(t, Some(_)) => t,
        other => panic!("{other:?}"),
    };
    assert_eq!(side(decide(v, newest(0))), Target::Remote);
    // The remote's clock is 5 s ahead: the local edit was the later one. The later `updatedAt` is kept.
    let Target::Merged(m) = side(decide(v, newest(5_000))) else {
        panic!("local x with the remote's updatedAt")
    };
    assert_eq!(m, at(12_000, 1));
}

#[test]
fn touching_updated_at_on_both_sides_is_no_conflict() {
    let at = |ms: i64| b(doc! {"_id": 1, "x": 1, "updatedAt": bson::DateTime::from_millis(ms)});
    let (l, base, r) = (at(5), at(0), at(7));
    let v = View {
        local: Some(&l),
        base: Some(&base),
        remote: Some(&r),
    };
    assert_eq!(
        decide(v, rules(Policy::Manual)),
        Decision::Settle(Target::Remote, None)
    );
}

#[test]
fn duplicate_names_are_compared_whole() {
    let dup = |x: i32| {
        let mut w = raw::Writer::new();
        w.i32("_id", 1).i32("a", 1).i32("a", x);
        w.finish()
    };
    let (l, base, r) = (dup(1), dup(0), dup(2));
    let v = View {
        local: Some(&l),
        base: Some(&base),
        remote: Some(&r),
    };
    assert_eq!(
        decide(v, rules(Policy::Manual)),
        Decision::Hold(Clash {
            kind: Kind::BothModified,
            fields: vec![]
        })
    );
    assert_eq!(
        decide(
            View {
                remote: Some(&base),
                ..v
            },
            rules(Policy::Manual)
        ),
        Decision::Settle(Target::Local, None)
    );
}

//! Rules by property: what they promise for any values, and that they leave nothing half decided.

use super::*;
use crate::config::Policy;
use crate::decide::{Decision, Rules, Target, View, decide};
use bson::{Bson, Document, doc};
use proptest::prelude::*;

fn b(d: &Document) -> Vec<u8> {
    d.to_vec().unwrap()
}

/// The field `f` of both sides under a rule; `None`: a conflict.
fn settle(rule: FieldRule, base: Option<Bson>, local: Bson, remote: Bson) -> Option<Bson> {
    let with = |v: Bson| doc! {"_id": 1, "f": v};
    let rules: FieldRules = [("f".to_owned(), rule)].into();
    let (base, l, r) = (
        base.map(|v| b(&with(v))),
        b(&with(local.clone())),
        b(&with(remote.clone())),
    );
    let view = View {
        local: Some(&l),
        base: base.as_deref(),
        remote: Some(&r),
    };
    let decision = decide(
        view,
        Rules {
            policy: Policy::Manual,
            updated_at: "updatedAt",
            skew_ms: 0,
            first_sync: false,
            fields: Some(&rules),
            base_may_lag: false,
        },
    );
    match decision {
        Decision::Agree | Decision::Settle(Target::Local, None) => Some(local),
        Decision::Settle(Target::Remote, None) => Some(remote),
        Decision::Settle(Target::Merged(m), None) => Document::from_reader(m.as_slice())
            .unwrap()
            .get("f")
            .cloned(),
        Decision::Hold(_) => None,
        other => panic!("{other:?}"),
    }
}

fn set_of(value: &Bson) -> std::collections::BTreeSet<i32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_i32().unwrap())
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn two_sales_offline_both_count(base in any::<i32>(), l in any::<i32>(), r in any::<i32>()) {
        let got = settle(FieldRule::SumOfChanges, Some(base.into()), l.into(), r.into()).unwrap();
        let want = if l == base { i64::from(r) } else if r == base || l == r { i64::from(l) } else { i64::from(l) + i64::from(r) - i64::from(base) };
        let got = got.as_i64().or(got.as_i32().map(i64::from));
        prop_assert_eq!(got, Some(want));
    }

    #[test]
    fn the_larger_and_the_smaller_whichever_side(base in -9..9_i32, l in -9..9_i32, r in -9..9_i32) {
        prop_assume!(l != base && r != base);
        for (rule, want) in [(FieldRule::Max, l.max(r)), (FieldRule::Min, l.min(r))] {
            prop_assert_eq!(settle(rule, Some(base.into()), l.into(), r.into()), Some(want.into()));
            prop_assert_eq!(settle(rule, Some(base.into()), r.into(), l.into()), Some(want.into()));
        }
    }

    #[test]
    fn a_union_has_what_was_added_and_not_what_was_removed(
        base in prop::collection::btree_set(0..6_i32, 0..5),
        l in prop::collection::btree_set(0..9_i32, 0..6),
        r in prop::collection::btree_set(0..9_i32, 0..6),
    ) {
        prop_assume!(l != base && r != base && l != r);
        let array = |s: &std::collections::BTreeSet<i32>| Bson::Array(s.iter().map(|v| Bson::Int32(*v)).collect());
        let got = settle(FieldRule::Union, Some(array(&base)), array(&l), array(&r)).unwrap();
        let want = (0..9).filter(|v| {
            if base.contains(v) { l.contains(v) && r.contains(v) } else { l.contains(v) || r.contains(v) }
        }).collect();
        prop_assert_eq!(set_of(&got), want);
        let back = settle(FieldRule::Union, Some(array(&base)), array(&r), array(&l)).unwrap();
        prop_assert_eq!(set_of(&got), set_of(&back));
    }

    #[test]
    fn appending_keeps_every_item_once_in_order(
        base in prop::collection::vec(0..9_i32, 0..4),
        l in prop::collection::vec(10..19_i32, 1..4),
        r in prop::collection::vec(20..29_i32, 1..4),
    ) {
        let array = |parts: &[&[i32]]| Bson::Array(parts.concat().into_iter().map(Bson::Int32).collect());
        let got = settle(FieldRule::Append, Some(array(&[&base])), array(&[&base, &l]), array(&[&base, &r]));
        prop_assert_eq!(got, Some(array(&[&base, &r, &l])));
    }

    #[test]
    fn a_rule_that_does_not_fit_leaves_a_conflict(rule in prop::sample::select(vec![
        FieldRule::Max, FieldRule::Min, FieldRule::SumOfChanges, FieldRule::Union, FieldRule::Append, FieldRule::Newest,
    ])) {
        prop_assert_eq!(settle(rule, Some(Bson::Null), Bson::Boolean(true), Bson::Int32(1)), None);
    }
}

#[test]
fn sides_types_and_edges() {
    let one = |rule, base: Option<Bson>, l: Bson, r: Bson| settle(rule, base, l, r);
    assert_eq!(
        one(FieldRule::Local, Some(1.into()), 2.into(), 3.into()),
        Some(2.into())
    );
    assert_eq!(
        one(FieldRule::Remote, Some(1.into()), 2.into(), 3.into()),
        Some(3.into())
    );
    // Numbers keep the wider type; whole ones grow when they must.
    let sum = FieldRule::SumOfChanges;
    assert_eq!(
        one(sum, Some(1.into()), Bson::Int64(2), 3.into()),
        Some(Bson::Int64(4))
    );
    assert_eq!(
        one(sum, Some(1.into()), Bson::Double(2.5), 3.into()),
        Some(Bson::Double(4.5))
    );
    assert_eq!(
        one(sum, Some(0.into()), i32::MAX.into(), 1.into()),
        Some(Bson::Int64(i64::from(i32::MAX) + 1))
    );
    assert_eq!(
        one(sum, Some(0.into()), Bson::Int64(i64::MAX), Bson::Int64(1)),
        None,
        "no overflow"
    );
    assert_eq!(
        one(sum, None, 2.into(), 3.into()),
        None,
        "nobody knows what was added"
    );
    assert_eq!(
        one(
            FieldRule::Max,
            Some(0.into()),
            Bson::Double(f64::NAN),
            3.into()
        ),
        None
    );
    let date = |ms| Bson::DateTime(bson::DateTime::from_millis(ms));
    assert_eq!(
        one(FieldRule::Max, Some(date(1)), date(5), date(3)),
        Some(date(5))
    );
    for name in NAMES {
        assert!(FieldRule::named(name).is_some());
    }
}

#[test]
fn both_sides_did_the_same() {
    let rules: FieldRules = [
        ("n".to_owned(), FieldRule::SumOfChanges),
        ("log".to_owned(), FieldRule::Append),
        ("tags".to_owned(), FieldRule::Union),
    ]
    .into();
    let doc =
        |n: i32, log: &[i32], tags: &[i32]| b(&doc! {"_id": 1, "n": n, "log": log, "tags": tags});
    let settled = |base: Option<&[u8]>, both: &[u8], base_may_lag: bool| {
        let view = View {
            local: Some(both),
            base,
            remote: Some(both),
        };
        let rules = Rules {
            policy: Policy::Manual,
            updated_at: "updatedAt",
            skew_ms: 0,
            first_sync: false,
            fields: Some(&rules),
            base_may_lag,
        };
        match decide(view, rules) {
            Decision::Agree => None,
            Decision::Settle(Target::Merged(m), None) => Some(m),
            other => panic!("{other:?}"),
        }
    };
    let (base, both) = (doc(10, &[1], &[1, 2]), doc(9, &[1, 2], &[2, 3]));
    // What each took away and added counts; a set has an item once.
    assert_eq!(
        settled(Some(&base), &both, false),
        Some(doc(8, &[1, 2, 2], &[2, 3]))
    );
    // Where somebody else may have settled it, being alike is being settled.
    assert_eq!(settled(Some(&base), &both, true), None);
    // Without a common past, or with nothing to add up, alike is alike.
    assert_eq!(settled(None, &both, false), None);
    assert_eq!(settled(Some(&both), &both, false), None);
    let moved = doc(10, &[1], &[2, 3]);
    assert_eq!(settled(Some(&base), &moved, false), None);
    // A number that is new on both sides was set up there.
    let bare = b(&doc! {"_id": 1});
    assert_eq!(settled(Some(&bare), &base, false), None);
}

#[test]
fn rules_apply_field_by_field_beside_other_changes() {
    let rules: FieldRules = [("stock".to_owned(), FieldRule::SumOfChanges)].into();
    let base = b(&doc! {"_id": 1, "stock": 10, "name": "a", "x": 1});
    let local = b(&doc! {"_id": 1, "stock": 8, "name": "b", "x": 1});
    let remote = b(&doc! {"_id": 1, "stock": 7, "name": "a", "x": 2});
    let with = |policy| Rules {
        policy,
        updated_at: "updatedAt",
        skew_ms: 0,
        first_sync: false,
        fields: Some(&rules),
        base_may_lag: false,
    };
    let view = View {
        local: Some(&local),
        base: Some(&base),
        remote: Some(&remote),
    };
    let want = b(&doc! {"_id": 1, "stock": 5, "name": "b", "x": 2});
    assert_eq!(
        decide(view, with(Policy::Manual)),
        Decision::Settle(Target::Merged(want.clone()), None)
    );
    // Carried out remote first, with the local content as base, the rest is a plain pull.
    let then = View {
        local: Some(&local),
        base: Some(&local),
        remote: Some(&want),
    };
    assert_eq!(
        decide(then, with(Policy::Manual)),
        Decision::Settle(Target::Remote, None)
    );
    // Another field in conflict: under a policy the rule still holds for its own.
    let remote = b(&doc! {"_id": 1, "stock": 7, "name": "c", "x": 2});
    let view = View {
        remote: Some(&remote),
        ..view
    };
    assert!(matches!(
        decide(view, with(Policy::Manual)),
        Decision::Hold(_)
    ));
    let Decision::Settle(Target::Merged(m), Some(clash)) = decide(view, with(Policy::RemoteWins))
    else {
        panic!("a merge with a clash on record");
    };
    assert_eq!(
        (clash.fields, m),
        (
            vec!["name".to_owned()],
            b(&doc! {"_id": 1, "stock": 5, "name": "c", "x": 2})
        )
    );
}

//! Every strategy on every kind of conflict between documents.

use super::*;
use crate::config::Policy;
use bson::{Document, doc};
use serde_json::json;

fn b(d: Document) -> Option<Vec<u8>> {
    Some(d.to_vec().unwrap())
}

fn versions(
    id: i32,
    local: Option<Vec<u8>>,
    base: Option<Vec<u8>>,
    remote: Option<Vec<u8>>,
) -> Versions {
    let raw = doc! {"_id": id}.to_vec().unwrap();
    let id = Id::of(&raw).unwrap();
    Versions {
        key: Key::new(1, &id),
        id,
        local,
        base,
        remote,
    }
}

fn rules() -> Rules<'static> {
    Rules {
        policy: Policy::Manual,
        updated_at: "updatedAt",
        skew_ms: 0,
        first_sync: false,
        fields: None,
        base_may_lag: false,
    }
}

fn plan(
    kind: Kind,
    fields: &[&str],
    mine: &Versions,
    theirs: Option<&Versions>,
    (strategy, value): (Strategy, Option<serde_json::Value>),
) -> Result<Plan, Refusal> {
    let fields: Vec<String> = fields.iter().map(|f| (*f).to_owned()).collect();
    let case = Case {
        kind,
        fields: &fields,
        mine,
        theirs,
        rules: rules(),
    };
    case.plan(strategy, value.as_ref())
}

#[test]
fn the_same_field_changed_on_both_sides() {
    let local = b(doc! {"_id": 1, "a": 2, "b": 1});
    let remote = b(doc! {"_id": 1, "a": 3, "b": 1, "c": 1});
    let m = versions(
        1,
        local.clone(),
        b(doc! {"_id": 1, "a": 1, "b": 1}),
        remote.clone(),
    );
    let go = |s, v| plan(Kind::BothModified, &["a"], &m, None, (s, v));

    let p = go(Strategy::KeepLocal, None).unwrap();
    assert_eq!(
        (p.steps[0].side, &p.steps[0].expect, &p.steps[0].new),
        (Side::Remote, &remote, &local)
    );
    let p = go(Strategy::KeepRemote, None).unwrap();
    assert_eq!(
        (p.steps[0].side, &p.steps[0].expect, &p.steps[0].new),
        (Side::Local, &local, &remote)
    );
    let p = go(Strategy::Merge, None).unwrap();
    let merged = b(doc! {"_id": 1, "a": 2, "b": 1, "c": 1});
    assert_eq!((&p.result, &p.steps[0].base_after), (&merged, &local));
    let p = go(Strategy::Merge, Some(json!("7"))).unwrap();
    assert_eq!(p.result, b(doc! {"_id": 1, "a": 7, "b": 1, "c": 1}));
    assert!(matches!(
        go(Strategy::Merge, Some(json!("x"))),
        Err(Refusal::Value(_))
    ));
    assert!(matches!(
        go(Strategy::KeepLocal, Some(json!(1))),
        Err(Refusal::Value(_))
    ));
    assert!(matches!(
        go(Strategy::RenameLocal, Some(json!(1))),
        Err(Refusal::Unfit(_))
    ));
}

#[test]
fn a_deletion_against_a_change() {
    let m = versions(
        1,
        None,
        b(doc! {"_id": 1, "a": 1}),
        b(doc! {"_id": 1, "a": 2}),
    );
    let go = |s| plan(Kind::DeleteUpdate, &[], &m, None, (s, None)).unwrap();
    assert_eq!(
        (
            go(Strategy::KeepLocal).steps[0].side,
            go(Strategy::KeepLocal).result
        ),
        (Side::Remote, None)
    );
    assert_eq!(go(Strategy::KeepRemote).result, m.remote);
    assert_eq!(
        go(Strategy::Merge).result,
        m.remote,
        "the document that lives"
    );
}

#[test]
fn a_unique_value_that_is_taken() {
    let mine = versions(1, b(doc! {"_id": 1, "u": "x", "p": 1}), None, None);
    let theirs = versions(2, None, None, b(doc! {"_id": 2, "u": "x", "q": 2}));
    let go = |s, v| plan(Kind::UniqueField, &["u"], &mine, Some(&theirs), (s, v));

    for s in [Strategy::RenameLocal, Strategy::KeepLocal, Strategy::Merge] {
        let p = go(s, Some(json!("y"))).unwrap();
        assert_eq!(p.result, b(doc! {"_id": 1, "u": "y", "p": 1}));
        assert_eq!(
            (
                p.steps[0].side,
                &p.steps[0].base_after,
                p.steps[0].from_other
            ),
            (Side::Local, &None, false)
        );
    }
    for s in [Strategy::RenameLocal, Strategy::KeepLocal] {
        assert!(matches!(go(s, None), Err(Refusal::Value(_))));
        assert!(
            matches!(go(s, Some(json!("x"))), Err(Refusal::Value(_))),
            "the taken one"
        );
    }
    let p = go(Strategy::KeepRemote, None).unwrap();
    assert_eq!(
        (p.steps.len(), &p.steps[0].new, p.steps[0].side),
        (1, &None, Side::Local)
    );
    let p = go(Strategy::Merge, None).unwrap();
    assert_eq!(p.other_result, b(doc! {"_id": 2, "u": "x", "q": 2, "p": 1}));
    assert_eq!(
        (p.steps[0].side, p.steps[1].side, &p.steps[1].new),
        (Side::Remote, Side::Local, &None)
    );
}

#[test]
fn a_document_known_on_both_sides_goes_back_rather_than_away() {
    let old = b(doc! {"_id": 1, "u": "old"});
    let mine = versions(1, b(doc! {"_id": 1, "u": "x"}), old.clone(), old.clone());
    let theirs = versions(2, None, None, b(doc! {"_id": 2, "u": "x"}));
    let go = |s| plan(Kind::UniqueField, &["u"], &mine, Some(&theirs), (s, None));
    assert_eq!(go(Strategy::KeepRemote).unwrap().result, old);
    assert!(matches!(go(Strategy::Merge), Err(Refusal::Unfit(_))));
}

#[test]
fn several_fields_take_several_values() {
    let mine = versions(1, b(doc! {"_id": 1, "hall": "A", "seat": 5}), None, None);
    let theirs = versions(2, None, None, b(doc! {"_id": 2, "hall": "A", "seat": 5}));
    let go = |v| {
        plan(
            Kind::UniqueField,
            &["hall", "seat"],
            &mine,
            Some(&theirs),
            (Strategy::RenameLocal, Some(v)),
        )
    };
    assert_eq!(
        go(json!({"seat": "6"})).unwrap().result,
        b(doc! {"_id": 1, "hall": "A", "seat": 6})
    );
    assert!(go(json!("6")).is_err());
    assert!(go(json!({"row": 6})).is_err());
}

#[test]
fn auto_resolve_keeps_the_order_of_the_design() {
    let (young, old) = (
        Some(Duration::from_secs(60)),
        Some(Duration::from_secs(7200)),
    );
    let (local, remote) = (Some(Side::Local), Some(Side::Remote));
    let unique = Kind::UniqueField;
    assert!(matches!(
        automatic(unique, young, true, remote),
        Auto::Rename(_)
    ));
    assert!(matches!(automatic(unique, old, false, remote), Auto::Retry));
    assert!(matches!(
        automatic(unique, old, true, remote),
        Auto::KeepRemote(_)
    ));
    assert!(matches!(
        automatic(unique, None, true, local),
        Auto::Rename(_)
    ));
    assert!(matches!(automatic(unique, None, true, None), Auto::Skip(_)));
    assert!(matches!(
        automatic(Kind::BothModified, young, false, remote),
        Auto::KeepRemote(_)
    ));
    assert!(matches!(
        automatic(Kind::BothModified, young, false, local),
        Auto::Skip(_)
    ));
    assert!(matches!(
        automatic(Kind::Rejected, None, false, remote),
        Auto::Skip(_)
    ));
    assert!(matches!(
        automatic(Kind::MassDelete, None, false, remote),
        Auto::Skip(_)
    ));
}

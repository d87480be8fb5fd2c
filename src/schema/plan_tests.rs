use bson::doc;
use proptest::prelude::*;

use super::*;

fn index(name: &str, key: Document, options: Document) -> Index {
    let mut spec = doc! {"name": name, "key": key};
    spec.extend(options);
    Index::from_spec(&spec).unwrap()
}

fn with(indexes: &[Index]) -> Definition {
    Definition {
        indexes: indexes.to_vec(),
        ..Definition::default()
    }
}

fn of_three(
    local: &Definition,
    base: Option<&Definition>,
    remote: &Definition,
    sync: SchemaSync,
) -> (Vec<Step>, Option<Definition>) {
    let trees = Trees {
        local: Some(local),
        base,
        remote: Some(remote),
    };
    plan(trees, sync)
}

#[test]
fn a_new_index_is_made_on_the_other_side_and_a_dropped_one_is_reported() {
    let (a, b) = (
        index("a", doc! {"a": 1}, doc! {}),
        index("b", doc! {"b": 1}, doc! {}),
    );
    let (local, remote) = (
        with(std::slice::from_ref(&a)),
        with(std::slice::from_ref(&b)),
    );
    let (steps, base) = of_three(&local, None, &remote, SchemaSync::Indexes);
    let wanted = [
        Step::Index {
            on: Side::Remote,
            index: a.clone(),
        },
        Step::Index {
            on: Side::Local,
            index: b.clone(),
        },
    ];
    assert_eq!(steps, wanted);
    assert_eq!(base, Some(with(&[])));

    let both = with(&[a.clone(), b.clone()]);
    let (steps, base) = of_three(&both, Some(&both), &remote, SchemaSync::Indexes);
    let dropped = Step::Dropped {
        on: Side::Remote,
        index: a,
    };
    assert_eq!(steps, [dropped]);
    // It stays known, and is forgotten once it is gone from both.
    assert_eq!(base.unwrap().indexes.len(), 2);
    let (steps, base) = of_three(&remote, Some(&both), &remote, SchemaSync::Indexes);
    assert_eq!((steps, base), (vec![], Some(remote)));
}

#[test]
fn the_same_by_another_name_number_type_or_server_version_is_the_same() {
    let here = index("a_1", doc! {"a": 1, "b": -1}, doc! {"v": 2, "unique": true});
    let there = index(
        "other",
        doc! {"a": 1.0, "b": -1_i64},
        doc! {"v": 1, "unique": 1, "background": true, "sparse": false},
    );
    let (steps, base) = of_three(&with(&[here]), None, &with(&[there]), SchemaSync::Full);
    assert_eq!(steps, []);
    assert_eq!(base.unwrap().indexes.len(), 1);
    let swapped = [
        index("x", doc! {"b": -1, "a": 1}, doc! {}),
        index("x", doc! {"a": 1, "b": -1}, doc! {}),
    ];
    assert!(!swapped[0].is_alike(&swapped[1]));
}

#[test]
fn what_can_not_be_both_is_reported_and_not_touched() {
    let plain = index("a_1", doc! {"a": 1}, doc! {});
    for other in [
        index("a_1", doc! {"b": 1}, doc! {}),
        index("a_1", doc! {"a": 1}, doc! {"unique": true}),
        index("a_2", doc! {"a": 1}, doc! {"expireAfterSeconds": 9}),
    ] {
        for sync in [SchemaSync::Report, SchemaSync::Indexes, SchemaSync::Full] {
            let (steps, base) = of_three(
                &with(std::slice::from_ref(&plain)),
                None,
                &with(std::slice::from_ref(&other)),
                sync,
            );
            assert!(
                matches!(&steps[..], [Step::Differ { changed: None, .. }]),
                "{steps:?}"
            );
            assert_eq!(base, Some(with(&[])));
        }
    }
    // Other collations or filters make other indexes.
    let german = index("de", doc! {"a": 1}, doc! {"collation": {"locale": "de"}});
    let (steps, _) = of_three(&with(&[plain]), None, &with(&[german]), SchemaSync::Indexes);
    assert!(
        matches!(&steps[..], [Step::Index { .. }, Step::Index { .. }]),
        "{steps:?}"
    );
}

#[test]
fn full_carries_changes_over_where_base_tells_whose_they_are() {
    let ttl = |seconds: i32| index("t", doc! {"at": 1}, doc! {"expireAfterSeconds": seconds});
    let (old, new) = (with(&[ttl(10)]), with(&[ttl(20)]));
    let (steps, _) = of_three(&old, Some(&old), &new, SchemaSync::Full);
    let change = doc! {"index": {"name": "t", "expireAfterSeconds": 20}};
    let on = Side::Local;
    assert_eq!(steps, [Step::Modify { on, change }]);
    let (steps, _) = of_three(&old, Some(&old), &new, SchemaSync::Indexes);
    let changed = Some(Side::Remote);
    assert!(matches!(&steps[..], [Step::Differ { changed: c, .. }] if *c == changed));

    let valid = |by: Document| Definition {
        options: by,
        ..Definition::default()
    };
    let strict = valid(doc! {"validator": {"a": {"$gt": 1}}});
    let (steps, base) = of_three(
        &strict,
        Some(&valid(doc! {})),
        &valid(doc! {}),
        SchemaSync::Full,
    );
    let change = doc! {"validator": {"a": {"$gt": 1}}, "validationLevel": "strict", "validationAction": "error"};
    let on = Side::Remote;
    assert_eq!(steps, [Step::Modify { on, change }]);
    assert_eq!(base, Some(valid(doc! {})));
    let (steps, _) = of_three(
        &valid(doc! {"capped": true}),
        None,
        &strict,
        SchemaSync::Full,
    );
    assert_eq!(steps.len(), 2, "{steps:?}");
    assert!(steps.iter().all(|s| matches!(s, Step::Options { .. })));
}

#[test]
fn a_collection_gone_from_one_side_is_left_alone() {
    let there = with(&[index("a", doc! {"a": 1}, doc! {})]);
    let trees = |base| Trees {
        local: None,
        base,
        remote: Some(&there),
    };
    assert_eq!(
        plan(trees(Some(&there)), SchemaSync::Full),
        (vec![], Some(there.clone()))
    );
    let (steps, base) = plan(trees(None), SchemaSync::Full);
    assert!(matches!(
        &steps[..],
        [Step::Create { .. }, Step::Index { .. }]
    ));
    assert_eq!(base, None);
}

fn some_index() -> impl Strategy<Value = Index> {
    (0..3, 0..3, 0..4).prop_map(|(name, key, option)| {
        let options = match option {
            0 => doc! {},
            1 => doc! {"unique": true},
            2 => doc! {"expireAfterSeconds": 60},
            _ => doc! {"collation": {"locale": "de"}},
        };
        index(&format!("n{name}"), doc! {format!("k{key}"): 1}, options)
    })
}

fn some() -> impl Strategy<Value = Definition> {
    prop::collection::vec(some_index(), 0..4).prop_map(|mut all| {
        // Names are unique on a server.
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all.dedup_by(|a, b| a.name == b.name);
        with(&all)
    })
}

proptest! {
    /// Every index that only one side has leads to exactly one step; equal sides to none; nothing is
    /// ever dropped, and carrying out the steps leads to fewer of them.
    #[test]
    fn every_difference_is_acted_on_or_said(local in some(), base in some(), remote in some()) {
        let (steps, agreed) = of_three(&local, Some(&base), &remote, SchemaSync::Indexes);
        let mut after = [local.clone(), remote.clone()];
        let mut said = 0;
        for step in &steps {
            match step {
                Step::Index { on, index } => after[*on as usize].indexes.push(index.clone()),
                Step::Dropped { .. } | Step::Differ { .. } => said += 1,
                other => prop_assert!(false, "{other:?}"),
            }
        }
        let [l, r] = &after;
        let (again, _) = of_three(l, agreed.as_ref(), r, SchemaSync::Indexes);
        let making = again.iter().any(|s| matches!(s, Step::Index { .. }));
        prop_assert!(!making || said > 0);
        if said == 0 {
            let unmatched = |a: &Definition, b: &Definition| {
                a.indexes.iter().filter(|i| !b.indexes.iter().any(|j| i.is_alike(j))).count()
            };
            prop_assert_eq!(unmatched(l, r) + unmatched(r, l), 0);
        }
        let (none, _) = of_three(&local, Some(&base), &local, SchemaSync::Indexes);
        prop_assert_eq!(none, vec![]);
    }
}

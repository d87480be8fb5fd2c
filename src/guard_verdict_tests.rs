//! Verdicts other than "done" and "modified", and batches.

use mongodb::IndexModel;
use mongodb::options::IndexOptions;

use super::*;
use crate::guard;

#[tokio::test]
async fn a_taken_unique_value_is_told_with_its_index() {
    let place = Place::new(true).await;
    let options = IndexOptions::builder().unique(true).build();
    let index = IndexModel::builder()
        .keys(doc! {"hall": 1, "day": 1})
        .options(options)
        .build();
    place.docs().create_index(index).await.unwrap();
    place
        .put(&b(doc! {"_id": 2, "hall": 1, "day": "Monday"}))
        .await;
    let taken = doc! {"_id": 1, "hall": 1, "day": "Monday", "pad": pad()};
    let free = doc! {"_id": 1, "hall": 2, "day": "Monday", "pad": pad()};
    let reordered = doc! {"pad": pad(), "_id": 1, "day": "Monday", "hall": 1};
    let told = Verdict::Duplicate(Box::new(Duplicate {
        pattern: doc! {"hall": 1, "day": 1},
        value: doc! {"hall": 1, "day": "Monday"},
        collation: None,
    }));
    // By an insert, by fields, by the whole document.
    assert_eq!(place.write(None, Some(&b(taken.clone()))).await.1, told);
    place.put(&b(free.clone())).await;
    assert_eq!(
        place.write(Some(&b(free.clone())), Some(&b(taken))).await.1,
        told
    );
    assert_eq!(
        place
            .write(Some(&b(free.clone())), Some(&b(reordered)))
            .await
            .1,
        told
    );
    assert_eq!(place.there().await, Some(b(free)));
}

#[tokio::test]
async fn a_validators_no_is_a_rejection_with_its_code() {
    let place = Place::new(true).await;
    let create = doc! {"create": &place.coll, "validator": {"n": {"$type": "number"}}};
    place.endpoint.run_doc("d", create).await.unwrap();
    let refused = |v: &Verdict| matches!(v, Verdict::Rejected { code: 121, .. });
    let (good, bad) = (
        b(doc! {"_id": 1, "n": 1, "pad": pad()}),
        b(doc! {"_id": 1, "n": "one", "pad": pad()}),
    );
    let (_, verdict) = place.write(None, Some(&bad)).await;
    assert!(refused(&verdict), "{verdict:?}");
    place.put(&good).await;
    let (form, verdict) = place.write(Some(&good), Some(&bad)).await;
    assert!(
        matches!(form, Form::Fields(_)) && refused(&verdict),
        "{verdict:?}"
    );
    let (_, verdict) = place.write(Some(&good), Some(&b(doc! {"_id": 1}))).await;
    assert!(refused(&verdict), "{verdict:?}");
    assert_eq!(place.there().await, Some(good));
}

#[tokio::test]
async fn in_a_batch_each_write_has_its_own_verdict() {
    // GIVEN creates, changes and deletions together, some of which meet what they did not expect
    let place = Place::new(false).await;
    for i in [10, 11, 20, 21] {
        place
            .put(&b(doc! {"_id": i, "v": if i % 10 == 0 { 1 } else { 99 }}))
            .await;
    }
    let one = |i: i32, from: Option<i32>, to: Option<i32>| {
        let content = |v: i32| b(doc! {"_id": i, "v": v});
        let (expect, new) = (from.map(content), to.map(content));
        let id = Id::of(expect.as_deref().or(new.as_deref()).unwrap()).unwrap();
        let write = Write {
            key: Key::new(1, &id),
            id,
            expect,
            new,
        };
        let form = form(&write, &[]);
        (write, form)
    };
    let writes = [
        one(1, None, Some(1)),
        one(10, None, Some(1)),
        one(10, Some(1), Some(2)),
        one(11, Some(1), Some(2)),
        one(20, Some(1), None),
    ];
    let outcome = guard::write(
        &place.endpoint,
        ("d", &place.coll),
        &writes.each_ref().map(|(w, f)| (w, f)),
        &[],
        None,
    )
    .await;
    use Verdict::{Done, Modified, Unknown};
    assert_eq!(outcome.verdicts, [Done, Modified, Done, Modified, Done]);
    // WHEN a deletion finds less than it expected THEN none of its command is sure
    let writes = [one(1, Some(1), None), one(21, Some(1), None)];
    let outcome = guard::write(
        &place.endpoint,
        ("d", &place.coll),
        &writes.each_ref().map(|(w, f)| (w, f)),
        &[],
        None,
    )
    .await;
    let unsure = Unknown { late: false };
    assert_eq!(outcome.verdicts, [unsure.clone(), unsure]);
    let left = place.docs().count_documents(doc! {}).await.unwrap();
    assert_eq!(left, 3, "10, 11 and 21");
}

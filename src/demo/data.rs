//! A temple's data, invented: a few thousand documents as an app of such a house would write them.
//!
//! The same seed and day give the same documents. They have what makes real documents awkward:
//! nested documents, arrays, nulls, missing fields, decimals, binary data, several scripts and
//! `_id`s of more than one type.

use chrono::{DateTime, Datelike, Duration, Utc};
use mongodb::bson::oid::ObjectId;
use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{self, Binary, Bson, Decimal128, Document, doc};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

mod words;

use words::{EVENTS, NAMES, OFFICES, RITUALS, ROLES, STOCK, TASKS, VENUES, WISHES};

/// Name of the database on both sides.
pub(super) const DATABASE: &str = "temple";

/// A collection and what is in it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Collection {
    pub(super) name: &'static str,
    pub(super) documents: Vec<Document>,
}

/// Where a booking was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Channel {
    /// At the counter, in the local database.
    Counter,
    /// On the public site, in the cloud.
    Website,
}

/// Writes documents as the temple's app would.
#[derive(Clone, Debug)]
pub(super) struct Temple {
    rng: StdRng,
    now: DateTime<Utc>,
}

/// A booking's people and what they booked, for sentences.
#[derive(Clone, Debug)]
pub(super) struct Booking {
    pub(super) document: Document,
    pub(super) name: String,
    pub(super) ritual: String,
    /// `14 June at 06:30`.
    pub(super) when: String,
}

impl Temple {
    /// A temple whose history ends at `now`.
    pub(super) fn new(seed: u64, now: DateTime<Utc>) -> Self {
        let rng = StdRng::seed_from_u64(seed);
        Self { rng, now }
    }

    /// All collections, full.
    pub(super) fn everything(&mut self) -> Vec<Collection> {
        let mut of = |name, count: usize, make: fn(&mut Self, usize) -> Document| Collection {
            name,
            documents: (0..count).map(|at| make(self, at)).collect(),
        };
        vec![
            of("roles", ROLES.len(), Self::role),
            of("admins", 24, Self::admin),
            of("committee_members", 15, Self::committee_member),
            of("available_rituals", RITUALS.len() * 2, Self::ritual),
            of("stock", 220, Self::stock),
            of("events", 160, Self::event),
            of("gallery_images", 240, Self::gallery_image),
            of("calendar", 365, Self::calendar_day),
            of("employee_bookings", 420, Self::employee_booking),
            of("activities", 900, Self::activity),
            of("bookings", 1_800, |temple, _| {
                let at = temple.past(540);
                temple.booking_made(at, Channel::Counter).document
            }),
        ]
    }

    /// A booking that is made right now.
    pub(super) fn booking(&mut self, channel: Channel) -> Booking {
        let mut booking = self.booking_made(Utc::now(), channel);
        // Not from the generator: a second tour on the same data makes new bookings.
        booking.document.insert("_id", ObjectId::new());
        booking
    }

    fn booking_made(&mut self, made: DateTime<Utc>, channel: Channel) -> Booking {
        let name = self.name().to_owned();
        let (ritual, price, _, most) = *self.pick(&RITUALS);
        let day = made + Duration::days(self.rng.random_range(1..60));
        let slot = format!(
            "{:02}:{}",
            self.rng.random_range(6..20),
            self.pick(&["00", "30"])
        );
        let paid = self.rng.random_bool(0.6);
        let changed = made + Duration::minutes(self.rng.random_range(0..300));
        let prefix = match channel {
            Channel::Counter => "B",
            Channel::Website => "W",
        };
        let mut document = doc! {
            "_id": self.id(made),
            "number": format!("{prefix}-{:07}", self.rng.random_range(0..10_000_000)),
            "name": &name,
            "phone": self.phone(),
            "email": self.email(&name),
            "ritual": ritual,
            "date": day.format("%Y-%m-%d").to_string(),
            "slot": &slot,
            "persons": self.rng.random_range(1..=most),
            "amount": money(price),
            "status": if paid { "paid" } else { "reserved" },
            "channel": match channel {
                Channel::Counter => "counter",
                Channel::Website => "website",
            },
            "createdAt": date(made),
            // A clock ahead of the present would be a lie, and the pull would wait for it.
            "updatedAt": date(changed.min(self.now.max(made))),
        };
        if paid {
            let receipt = self.rng.random_range(10_000..99_999);
            let method = *self.pick(&["cash", "card", "transfer"]);
            document.insert("payment", doc! {"method": method, "receipt": receipt});
        }
        if self.rng.random_bool(0.25) {
            document.insert("wishes", *self.pick(&WISHES));
        }
        let when = format!("{} {} at {slot}", day.day(), day.format("%B"));
        Booking {
            document,
            name,
            ritual: ritual.to_lowercase(),
            when,
        }
    }

    fn role(&mut self, at: usize) -> Document {
        let (name, permissions) = ROLES[at];
        doc! {"_id": name, "permissions": permissions, "updatedAt": date(self.past(700))}
    }

    fn admin(&mut self, at: usize) -> Document {
        let name = NAMES[at * 2];
        let made = self.past(900);
        doc! {
            "_id": self.id(made),
            "username": name.to_lowercase(),
            "name": name,
            "role": self.pick(&ROLES).0,
            "active": self.rng.random_bool(0.9),
            "lastLogin": if at.is_multiple_of(5) { Bson::Null } else { date(self.past(20)) },
            "loginCount": i64::from(self.rng.random_range(0..4_000)),
            "preferences": {"language": *self.pick(&["en", "ta", "hi"]), "printer": at as i32 % 3},
            "createdAt": date(made),
            "updatedAt": date(self.past(20)),
        }
    }

    /// A new administrator with this username, as either side may make one.
    pub(super) fn new_admin(&mut self, username: &str, name: &str, role: &str) -> Document {
        let now = Utc::now();
        doc! {
            "_id": ObjectId::new(),
            "username": username,
            "name": name,
            "role": role,
            "phone": self.phone(),
            "active": true,
            "createdAt": date(now),
            "updatedAt": date(now),
        }
    }

    fn committee_member(&mut self, at: usize) -> Document {
        let since = self.past(2_000);
        doc! {
            "_id": self.id(since),
            "name": NAMES[at * 3 + 1],
            "office": OFFICES.get(at).copied().unwrap_or("member"),
            "since": since.year(),
            "phone": self.phone(),
            "updatedAt": date(self.past(400)),
        }
    }

    fn ritual(&mut self, at: usize) -> Document {
        let (name, price, minutes, most) = RITUALS[at % RITUALS.len()];
        let weekend = at >= RITUALS.len();
        let made = self.past(800);
        doc! {
            "_id": self.id(made),
            "name": name,
            "days": if weekend { vec!["Sat", "Sun"] } else { vec!["Mon", "Tue", "Wed", "Thu", "Fri"] },
            "price": money(if weekend { price + price / 10 } else { price }),
            "minutes": minutes,
            "mostPersons": most,
            "venue": *self.pick(&VENUES),
            "items": (0..self.rng.random_range(1..5))
                .map(|_| doc! {"item": self.pick(&STOCK).0, "quantity": self.rng.random_range(1..9)})
                .collect::<Vec<_>>(),
            "updatedAt": date(self.past(200)),
        }
    }

    fn stock(&mut self, at: usize) -> Document {
        let (item, unit, category, usual) = STOCK[at % STOCK.len()];
        let counted = self.past(40);
        doc! {
            "_id": self.id(counted),
            "item": item,
            "shelf": format!("{}{}", char::from(b'A' + (at / STOCK.len()) as u8), at % STOCK.len() + 1),
            "category": category,
            "unit": unit,
            "quantity": (usual * self.rng.random_range(0.1..1.6) * 4.0).round() / 4.0,
            "reorderAt": usual / 4.0,
            "countedAt": date(counted),
            "countedBy": self.name(),
            "updatedAt": date(counted),
        }
    }

    fn event(&mut self, _: usize) -> Document {
        let made = self.past(500);
        let day = made + Duration::days(self.rng.random_range(7..120));
        let helpers: Vec<&str> = NAMES.choose_multiple(&mut self.rng, 4).copied().collect();
        doc! {
            "_id": self.id(made),
            "title": *self.pick(&EVENTS),
            "venue": *self.pick(&VENUES),
            "startsAt": date(day),
            "hours": self.rng.random_range(1..9),
            "expected": self.rng.random_range(20..1_500),
            "public": self.rng.random_bool(0.8),
            "helpers": helpers,
            "description": "Everyone is welcome. Please leave shoes at the east gate.",
            "updatedAt": date(self.past(90)),
        }
    }

    fn gallery_image(&mut self, at: usize) -> Document {
        let taken = self.past(1_500);
        let preview: Vec<u8> = (0..96).map(|_| self.rng.random()).collect();
        doc! {
            "_id": self.id(taken),
            "title": format!("{}, {}", self.pick(&EVENTS), taken.year()),
            "url": format!("https://images.example.org/gallery/{:04}.jpg", at + 1),
            "width": *self.pick(&[1_920, 2_048, 4_032]),
            "height": *self.pick(&[1_080, 1_365, 3_024]),
            "preview": Binary { subtype: BinarySubtype::Generic, bytes: preview },
            "tags": [*self.pick(&["hall", "lamps", "people"]), *self.pick(&["day", "night"])],
            "takenBy": if at.is_multiple_of(4) { Bson::Null } else { self.name().into() },
            "updatedAt": date(taken),
        }
    }

    fn calendar_day(&mut self, at: usize) -> Document {
        let day = self.now + Duration::days(at as i64 - 90);
        let mut document = doc! {
            "_id": day.format("%Y-%m-%d").to_string(),
            "opens": "05:30",
            "closes": if day.weekday().number_from_monday() > 5 { "21:30" } else { "20:30" },
            "moon": (at as f64 % 29.53 / 29.53 * 1_000.0).round() / 1_000.0,
            "updatedAt": date(self.past(120)),
        };
        if self.rng.random_bool(0.15) {
            document.insert("festival", *self.pick(&EVENTS));
        }
        document
    }

    fn employee_booking(&mut self, _: usize) -> Document {
        let made = self.past(300);
        let day = made + Duration::days(self.rng.random_range(0..30));
        doc! {
            "_id": self.id(made),
            "employee": self.name(),
            "duty": *self.pick(&["priest", "kitchen", "counter", "garden", "cleaning"]),
            "date": day.format("%Y-%m-%d").to_string(),
            "from": self.rng.random_range(5..14),
            "hours": f64::from(self.rng.random_range(4..17)) / 2.0,
            "confirmed": self.rng.random_bool(0.85),
            "updatedAt": date(made),
        }
    }

    fn activity(&mut self, _: usize) -> Document {
        let at = self.past(180);
        let admin = NAMES[self.rng.random_range(0..24) * 2].to_lowercase();
        doc! {
            "_id": self.id(at),
            "admin": admin,
            "did": *self.pick(&TASKS),
            "at": date(at),
            "from": format!("192.0.2.{}", self.rng.random_range(1..255)),
            "updatedAt": date(at),
        }
    }

    /// A moment in the last `days` days.
    fn past(&mut self, days: i64) -> DateTime<Utc> {
        self.now - Duration::seconds(self.rng.random_range(60..days * 86_400))
    }

    /// An ObjectId as if made at that moment.
    fn id(&mut self, at: DateTime<Utc>) -> ObjectId {
        let mut bytes: [u8; 12] = self.rng.random();
        let seconds = u32::try_from(at.timestamp()).unwrap_or_default();
        bytes[..4].copy_from_slice(&seconds.to_be_bytes());
        ObjectId::from_bytes(bytes)
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.rng.random_range(0..of.len())]
    }

    fn name(&mut self) -> &'static str {
        NAMES[self.rng.random_range(0..NAMES.len())]
    }

    /// A number that nobody has.
    pub(super) fn phone(&mut self) -> String {
        format!("555-01{:02}", self.rng.random_range(0..100))
    }

    fn email(&mut self, name: &str) -> Bson {
        if self.rng.random_bool(0.3) {
            return Bson::Null;
        }
        let number = self.rng.random_range(1..100);
        format!("{}{number}@example.org", name.to_lowercase()).into()
    }
}

/// A BSON date.
pub(super) fn date(at: DateTime<Utc>) -> Bson {
    bson::DateTime::from_millis(at.timestamp_millis()).into()
}

/// An amount as an exact decimal.
fn money(whole: i32) -> Bson {
    let amount: Result<Decimal128, _> = format!("{whole}.00").parse();
    amount
        .expect("an integer with two zeros is a decimal")
        .into()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn everything(seed: u64) -> Vec<Collection> {
        let now = DateTime::from_timestamp(1_780_000_000, 0).unwrap();
        Temple::new(seed, now).everything()
    }

    #[test]
    fn the_same_seed_gives_the_same_temple_and_another_another() {
        assert_eq!(everything(7), everything(7));
        assert_ne!(everything(7), everything(8));
    }

    #[test]
    fn every_collection_is_there_with_a_few_thousand_documents_in_all() {
        let all = everything(7);
        let names: HashSet<&str> = all.iter().map(|c| c.name).collect();
        let expected = [
            "admins",
            "bookings",
            "employee_bookings",
            "events",
            "available_rituals",
            "stock",
            "committee_members",
            "gallery_images",
            "roles",
            "activities",
            "calendar",
        ];
        assert_eq!(names, expected.into());
        let total: usize = all.iter().map(|c| c.documents.len()).sum();
        assert!((3_000..6_000).contains(&total), "{total}");
    }

    #[test]
    fn every_document_has_an_id_of_its_own_and_a_past_updated_at() {
        let now = bson::DateTime::from_millis(1_780_000_000_000);
        for collection in everything(7) {
            let mut ids = HashSet::new();
            for document in &collection.documents {
                let id = document.get("_id").unwrap().to_string();
                assert!(ids.insert(id), "{document}");
                let updated = document.get_datetime("updatedAt").unwrap();
                assert!(*updated <= now, "{document}");
            }
        }
    }

    #[test]
    fn usernames_are_unique() {
        let all = everything(7);
        let admins = all.iter().find(|c| c.name == "admins").unwrap();
        let names = admins
            .documents
            .iter()
            .map(|a| a.get_str("username").unwrap());
        assert_eq!(names.collect::<HashSet<_>>().len(), admins.documents.len());
    }

    #[test]
    fn documents_vary() {
        let all = everything(7);
        let bookings = all.iter().find(|c| c.name == "bookings").unwrap();
        let shapes: HashSet<Vec<&str>> = bookings
            .documents
            .iter()
            .map(|b| b.keys().map(String::as_str).collect())
            .collect();
        assert!(shapes.len() >= 4, "{shapes:?}");
    }

    #[test]
    fn a_new_booking_is_new_each_time_even_with_the_same_seed() {
        let booking = || Temple::new(7, Utc::now()).booking(Channel::Website);
        let (one, two) = (booking(), booking());
        assert_ne!(one.document.get("_id"), two.document.get("_id"));
        assert!(one.when.contains(" at "));
    }
}

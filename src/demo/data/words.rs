//! Words for the temple's documents: given names and things, all invented or general.

/// Given names of people who exist only here.
pub(super) const NAMES: [&str; 48] = [
    "Aarav", "Aditi", "Ajay", "Amala", "Amrita", "Anand", "Anika", "Arjun", "Asha", "Bhavna",
    "Chitra", "Deepak", "Devi", "Divya", "Esha", "Ganesh", "Gauri", "Gopal", "Hari", "Indira",
    "Isha", "Jaya", "Kamala", "Karthik", "Kavya", "Kiran", "Lata", "Leela", "Madhav", "Manoj",
    "Mohan", "Nalini", "Naveen", "Nisha", "Padma", "Prakash", "Priya", "Radha", "Rajesh", "Rohan",
    "Sanjay", "Shanti", "Sita", "Suresh", "Tara", "Uma", "Varun", "Vidya",
];

/// Rituals: name, price, minutes, people at most.
pub(super) const RITUALS: [(&str, i32, i32, i32); 18] = [
    ("Morning lamp", 51, 15, 4),
    ("Evening lamp", 51, 15, 4),
    ("Archana", 101, 20, 6),
    ("Abhishekam", 501, 45, 12),
    ("Ganapati homa", 1_501, 90, 15),
    ("Navagraha puja", 1_101, 75, 12),
    ("Satyanarayana puja", 2_101, 120, 25),
    ("Naming ceremony", 751, 60, 30),
    ("First rice", 751, 60, 30),
    ("Sacred thread", 5_001, 180, 80),
    ("Wedding blessing", 7_501, 150, 200),
    ("House blessing", 3_001, 120, 20),
    ("Vehicle blessing", 251, 20, 5),
    ("Full moon puja", 301, 40, 40),
    ("Lamp offering", 1_008, 60, 20),
    ("Flower garland", 151, 10, 2),
    ("Food offering", 2_501, 60, 100),
    ("Chanting hour", 201, 60, 50),
];

/// Things in the store room: name, unit, category, usual quantity.
pub(super) const STOCK: [(&str, &str, &str, f64); 22] = [
    ("Rice", "kg", "kitchen", 480.0),
    ("Lentils", "kg", "kitchen", 160.5),
    ("Jaggery", "kg", "kitchen", 75.0),
    ("Coconuts", "piece", "offerings", 640.0),
    ("Bananas", "dozen", "offerings", 90.0),
    ("Betel leaves", "bundle", "offerings", 60.0),
    ("Ghee", "litre", "lamps", 85.5),
    ("Sesame oil", "litre", "lamps", 120.0),
    ("Lamp wicks", "packet", "lamps", 300.0),
    ("Camphor", "kg", "lamps", 14.25),
    ("Incense", "packet", "offerings", 410.0),
    ("Sandalwood paste", "kg", "offerings", 6.5),
    ("Turmeric", "kg", "offerings", 22.0),
    ("Kumkum", "kg", "offerings", 18.0),
    ("Jasmine", "kg", "flowers", 30.0),
    ("Marigold", "kg", "flowers", 55.0),
    ("Leaf plates", "hundred", "kitchen", 70.0),
    ("Brass lamps", "piece", "vessels", 44.0),
    ("Silk cloth", "metre", "vestments", 95.0),
    ("Cotton cloth", "metre", "vestments", 210.0),
    ("Receipt books", "piece", "office", 36.0),
    ("Printer paper", "ream", "office", 20.0),
];

pub(super) const EVENTS: [&str; 12] = [
    "Festival of lights",
    "New year's prayers",
    "Spring festival",
    "Nine nights",
    "Chariot procession",
    "Harvest festival",
    "Music evening",
    "Children's story hour",
    "Blood donation day",
    "Community meal",
    "Garden working day",
    "Lecture and questions",
];

pub(super) const VENUES: [&str; 6] = [
    "Main hall",
    "East hall",
    "Courtyard",
    "Dining hall",
    "Library",
    "Garden",
];

pub(super) const TASKS: [&str; 10] = [
    "opened the main hall",
    "counted the donation box",
    "printed the day's list",
    "changed a booking's time",
    "cancelled a booking",
    "took in a delivery",
    "added pictures to the gallery",
    "answered a letter",
    "closed the counter",
    "corrected an address",
];

pub(super) const WISHES: [&str; 9] = [
    "wheelchair, please near the ramp",
    "birthday of the youngest",
    "before noon if possible",
    "two garlands extra",
    "call when the priest is free",
    "family from abroad, no shoes to be left outside in rain",
    "ஆசீர்வாதம் வேண்டும்",
    "आशीर्वाद के लिए",
    "25th wedding day",
];

pub(super) const ROLES: [(&str, &[&str]); 6] = [
    ("owner", &["*"]),
    (
        "manager",
        &["bookings", "events", "stock", "reports", "admins.read"],
    ),
    ("counter", &["bookings", "receipts"]),
    ("priest", &["bookings.read", "calendar"]),
    ("store", &["stock"]),
    ("editor", &["events", "gallery_images", "calendar"]),
];

pub(super) const OFFICES: [&str; 8] = [
    "chair",
    "deputy chair",
    "secretary",
    "treasurer",
    "buildings",
    "kitchen",
    "youth",
    "library",
];

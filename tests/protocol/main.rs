//! What the contract promises of each change on its way: queues, writes, streams, the link.
//!
//! One program for many files: each would be linked, and start servers, by itself otherwise.

#![allow(clippy::unwrap_used)] // clippy sees only the functions marked #[test] as tests

#[path = "../common/mod.rs"]
mod common;

mod budget;
mod counts;
mod durability;
mod elections;
mod expiry;
mod fields;
mod identity;
mod link;
mod merge;
mod pull;
mod stamps;
mod streams;
mod transactions;
mod unique;

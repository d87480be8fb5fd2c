//! Whole databases: first sync, comparisons, guards, every kind of data, indexes.
//!
//! One program for many files: each would be linked, and start servers, by itself otherwise.

#![allow(clippy::unwrap_used)] // clippy sees only the functions marked #[test] as tests

#[path = "../common/mod.rs"]
mod common;

mod corpus;
mod data;
mod first_sync;
mod guards;
mod large;
mod reconcile;
mod schema;

//! The conflict inbox: over HTTP, on the command line, and what a resolution writes.
//!
//! One program for many files: each would be linked, and start servers, by itself otherwise.

#![allow(clippy::unwrap_used)] // clippy sees only the functions marked #[test] as tests

#[path = "../common/mod.rs"]
mod common;

mod api;
mod cli;
mod resolve;
mod resolve_safely;
mod resolve_table;

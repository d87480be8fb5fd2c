//! The program as an administrator has it: configuration, commands, state file, dashboard, book.
//!
//! One program for many files: each would be linked, and start servers, by itself otherwise.

#![allow(clippy::unwrap_used)] // clippy sees only the functions marked #[test] as tests

#[path = "../common/mod.rs"]
mod common;

mod bad_config;
mod book;
mod cli;
mod damage;
mod dashboard;
mod demo;
mod disk;
mod doctor;
mod harness;
mod health;
mod init;
mod shell;
mod survey;
mod tls;
mod upgrade;

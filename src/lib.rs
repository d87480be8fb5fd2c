//! Sangam keeps a local MongoDB replica set and a remote one equal, both ways.

pub mod command;
pub mod config;
pub mod content;
pub mod daemon;
pub mod decide;
pub mod exact;
pub mod failpoint;
pub mod failure;
pub mod guard;
pub mod key;
pub mod link;
pub mod raw;
pub mod retry;
pub mod runs;
pub mod shared;
pub mod side;
pub mod store;

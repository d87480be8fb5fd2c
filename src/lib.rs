//! Sangam keeps a local MongoDB replica set and a remote one equal, both ways.

pub mod command;
pub mod config;
pub mod content;
pub mod daemon;
pub mod decide;
pub mod key;
pub mod raw;
pub mod store;

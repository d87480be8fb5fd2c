//! Sangam keeps a local MongoDB replica set and a remote one equal, both ways.

pub mod api;
pub mod cli;
pub mod client;
pub mod command;
pub mod config;
pub mod control;
pub mod daemon;
pub mod dispatch;
pub mod log;
pub mod notify;
pub mod run;
pub mod signals;
pub mod words;

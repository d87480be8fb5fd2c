//! Sangam keeps a local MongoDB replica set and a remote one equal, both ways.

pub mod command;
pub mod compare;
pub mod config;
pub mod daemon;
pub mod demo;
pub mod faultlink;
pub mod mongod;
pub mod process;

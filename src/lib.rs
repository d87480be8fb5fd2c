//! Sangam keeps a local MongoDB replica set and a remote one equal, both ways, over a link that may
//! be gone for weeks.
//!
//! ```text
//!             tail (capture)        worker
//!  local ───────────────▶ outbox ───────▶  batch: read local, base, remote as needed
//!    ▲                                     decide (pure) ─▶ intent ─▶ guard (write) ─▶ settle (base)
//!    └───────────────────  inbox ◀───────  tail (follow) / pull / reconcile ◀─── remote
//! ```
//!
//! Events and timestamps only say where to look; what to do is decided from three trees: the local
//! document, the remote one, and the base, which both last agreed on. Base, queues, intents and
//! stream positions are in one SQLite file, so any crash at any line is survivable.
//!
//! The modules in the order the data takes:
//! documents: [`raw`], [`key`], [`content`];
//! the state: [`store`];
//! where to look: `selection`, [`tail`], [`pull`], [`walk`], [`reconcile`], [`progress`];
//! indexes and options: [`schema`];
//! what to do: [`decide`];
//! doing it: [`order`], [`worker`], [`batch`], [`guard`], [`exact`], [`receipt`], [`expiry`], `unique`, `settle`, [`stamp`];
//! what only looks: [`verify`], [`plan`], over an [`extent`]; which side is right: [`adopt`];
//! what stays on record: [`conflicts`], [`runs`], [`recorder`], [`loss`], [`halt`], [`disk`];
//! the two databases and the way to the remote: [`side`], [`failure`], [`retry`], [`link`],
//! [`probe`], [`identity`]; which of several daemons writes: [`lease`];
//! how things are: [`watermark`], [`vitals`], [`metrics`], [`history`], [`overview`], [`tell`], [`outgoing`];
//! the daemon and what it is told: [`daemon`], [`shared`], [`command`], [`dispatch`], [`control`],
//! [`signals`], [`notify`], [`api`], [`client`], [`cli`], [`doctor`], [`bundle`];
//! the demo and the tests' tools: [`demo`], [`mongod`], [`faultlink`], [`compare`], [`failpoint`].

pub mod adopt;
pub mod advice;
pub mod api;
pub mod batch;
pub mod budget;
pub mod bundle;
pub mod cli;
pub mod client;
pub mod command;
pub mod compare;
pub mod config;
pub mod conflicts;
pub mod content;
pub mod control;
pub mod daemon;
pub mod decide;
pub mod demo;
pub mod disk;
pub mod dispatch;
pub mod doctor;
pub mod echo;
pub mod exact;
pub mod expiry;
pub mod extent;
pub mod failpoint;
pub mod failure;
pub mod faultlink;
pub mod guard;
pub mod halt;
pub mod handle;
pub mod history;
pub mod identity;
pub mod key;
pub mod lease;
pub mod lift;
pub mod link;
pub mod log;
pub mod loss;
pub mod many;
pub mod metrics;
pub mod mongod;
mod moved;
pub mod notify;
pub mod order;
pub mod outgoing;
pub mod overrides;
pub mod overview;
pub mod plan;
pub mod probe;
pub mod process;
pub mod progress;
pub mod pull;
pub mod raw;
pub mod receipt;
pub mod reconcile;
pub mod recorder;
pub mod resolution;
pub mod resolve;
pub mod retry;
pub mod rules;
pub mod ruling;
pub mod run;
pub mod runs;
pub mod schema;
pub(crate) mod selection;
pub(crate) mod settle;
pub mod shared;
pub mod side;
pub mod signals;
pub mod stamp;
pub mod store;
pub mod tail;
pub mod tell;
pub mod touched;
pub mod trial;
pub mod undo;
pub(crate) mod unique;
pub mod value;
pub mod verify;
pub mod view;
pub mod vitals;
pub mod walk;
pub mod watermark;
pub mod words;
pub mod worker;

#[cfg(test)]
mod parse_tests;

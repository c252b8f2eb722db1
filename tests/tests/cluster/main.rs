//! The whole product on a real cluster: the chart, the images, the examples. Each test's name is what it shows.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod account;
mod admission;
mod continuation;
mod example;
mod failure;
mod gang;
mod interruption;
mod leader;
mod limits;
mod meddling;
mod network;
mod outage;
mod planning;
mod queue;
mod removal;
mod room;
mod security;
mod stages;
mod strangers;
mod upgrade;

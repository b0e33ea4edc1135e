//! The integration tests: stories of an origin, the gateway and a client over real sockets.
//!
//! One module a phase, named like it, and a few for what crosses phases. [`harness`] holds the actors.

mod harness;

mod accept;
mod acme;
mod actors;
mod admin;
mod attacks;
mod balance;
mod bench;
mod blame;
mod boards;
mod breaker;
mod buffer;
mod calls;
mod churn;
mod cli;
mod config;
mod connect;
mod deadline;
mod discovery;
mod endings;
mod eventloop;
mod expressions;
mod filters;
mod finish;
mod framing;
mod grpc;
mod grpcio;
mod half_close;
mod handshake;
mod header;
mod health;
mod http2;
mod imports;
mod interim;
mod mirror;
mod observe;
mod origin;
mod pace;
mod page;
mod privileges;
mod proxy_protocol;
mod proxying;
mod queue;
mod rates;
mod receive;
mod relay;
mod reserves;
mod retry;
mod rfc9113;
mod route;
mod select;
mod send;
mod slow;
mod spans;
mod spool;
mod status;
mod sticky;
mod stop;
mod story;
mod timeline;
mod top;
mod trace;
mod trailers;
mod transport;
mod trust;
mod upgrades;
mod upstreams;
mod wait;
mod waits;
mod write;

#[path = "../fuzz/fuzz.rs"]
mod fuzz;

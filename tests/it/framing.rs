//! Message framing, byte by byte over real sockets: what passes, in which form, and what is refused. Tests of the
//! decisions themselves are in `src/framing`.

mod answers;
mod halves;
mod http2;
mod peers;
mod requests;

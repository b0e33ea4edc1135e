//! The `forebay` program: the library's command line with the built-in filters.
//!
//! A program with its own filters has the same line with `.filter::<T>()` after `builder()`.

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::c_void;
use std::process::ExitCode;

use mimalloc::MiMalloc;

unsafe extern "C" {
    fn mi_malloc(size: usize) -> *mut c_void;
    fn mi_zalloc(size: usize) -> *mut c_void;
    fn mi_realloc(memory: *mut c_void, size: usize) -> *mut c_void;
    fn mi_free(memory: *mut c_void);
    fn mi_usable_size(memory: *const c_void) -> usize;
}

/// The allocator: mimalloc. CPU time per small request relative to nginx, measured with `make bench`: 2.3 with the
/// system's allocator, 2.2 with jemalloc, 1.7 with mimalloc.
///
/// The mimalloc crate passes the alignment with every request, and mimalloc's aligned allocation takes three times the
/// instructions; memory that it aligned also takes longer to free. All memory of mimalloc is aligned to 8 bytes, and
/// blocks of 16 bytes and more to 16 (its `MI_MAX_ALIGN_SIZE`), which suffices for almost all requests.
struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

impl Allocator {
    /// Whether memory of this size always has this alignment.
    fn is_aligned_anyway(align: usize, size: usize) -> bool {
        align <= 8 || (align == 16 && size >= 16)
    }
}

// SAFETY: each function is mimalloc's own with the same meaning. mimalloc frees and resizes memory in the same way,
// whether it was allocated with an alignment or not.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: `mi_malloc` takes any size and returns null if memory is exhausted.
        if Self::is_aligned_anyway(layout.align(), layout.size()) {
            unsafe { mi_malloc(layout.size()).cast() }
        }
        // SAFETY: as the caller promises.
        else {
            unsafe { MiMalloc.alloc(layout) }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        if Self::is_aligned_anyway(layout.align(), layout.size()) {
            unsafe { mi_zalloc(layout.size()).cast() }
        }
        // SAFETY: as the caller promises.
        else {
            unsafe { MiMalloc.alloc_zeroed(layout) }
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the memory is mimalloc's, as the caller promises.
        if Self::is_aligned_anyway(layout.align(), size) {
            unsafe { mi_realloc(memory.cast(), size).cast() }
        }
        // SAFETY: as the caller promises.
        else {
            unsafe { MiMalloc.realloc(memory, layout, size) }
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, _: Layout) {
        // SAFETY: the memory is mimalloc's, as the caller promises.
        unsafe { mi_free(memory.cast()) }
    }
}

/// The size of the part of the heap that may use huge pages. Memory that small requests use repeatedly is at its
/// beginning.
const HUGE_BYTES: usize = 32 << 20;

/// BoringSSL allocates its memory through these functions, and so from the same allocator. The temporary memory of a
/// handshake lies between memory that a connection keeps. The system's allocator returned little of it: 2.8 KiB were
/// lost per parked connection. The linker resolves these functions by name.
mod boringssl {
    use pingora::tls::ssl_sys::OPENSSL_cleanse;

    use super::{c_void, mi_free, mi_malloc, mi_usable_size};

    #[unsafe(no_mangle)]
    extern "C" fn OPENSSL_memory_alloc(size: usize) -> *mut c_void {
        // SAFETY: `mi_malloc` takes any size and returns null if memory is exhausted.
        unsafe { mi_malloc(size) }
    }

    /// Overwrites the memory before it is freed, since it may contain a key.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn OPENSSL_memory_free(memory: *mut c_void) {
        // SAFETY: BoringSSL passes memory that it got above; here it is never null, and its size is as reported.
        unsafe {
            OPENSSL_cleanse(memory, mi_usable_size(memory));
            mi_free(memory);
        }
    }

    #[unsafe(no_mangle)]
    unsafe extern "C" fn OPENSSL_memory_get_size(memory: *mut c_void) -> usize {
        // SAFETY: BoringSSL got the memory above.
        unsafe { mi_usable_size(memory) }
    }
}

fn main() -> ExitCode {
    bound_huge_pages();
    forebay::cli::main(forebay::gateway::Gateway::builder(), std::env::args_os())
}

/// Limits huge pages to the beginning of the heap.
///
/// mimalloc requests huge pages for its whole heap. If many slow clients make the heap grow, the kernel clears 2 MiB at
/// a time in the middle of a request, which takes milliseconds, and commits 2 MiB where 64 KiB are needed.
fn bound_huge_pages() {
    let probe = Box::new(0_u8);
    let Some((begin, end)) = mapping_around(std::ptr::from_ref(&*probe).addr()) else { return };
    let bound = (begin + HUGE_BYTES).next_multiple_of(2 << 20);
    if bound < end {
        let rest = std::ptr::with_exposed_provenance_mut(bound);
        // SAFETY: the range is mapped, and the advice does not change its content. A failure has no effect.
        unsafe { libc::madvise(rest, end - bound, libc::MADV_NOHUGEPAGE) };
    }
}

/// The mapping in the address space that contains this address.
fn mapping_around(address: usize) -> Option<(usize, usize)> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let ranges = maps.lines().filter_map(|line| {
        let (begin, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((usize::from_str_radix(begin, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
    });
    ranges.into_iter().find(|(begin, end)| (*begin..*end).contains(&address))
}

#!/usr/bin/env bash
# Build the image on a machine that reaches Debian's packages and PyPI, but no registry of images: the base is made by
# debootstrap. Elsewhere `docker build .` or `podman build .` does without this script.
#
#   docker/build_local.sh "tests/losses tests/model/test_megatron_versions.py"    # the tests of the check stage
#
# Needs root, and `apt-get install debootstrap buildah`. Environment:
#   PYTHON_HOME  prefix of a CPython 3.12, copied into the base (default: pyenv's newest)
#   WHEELS       a folder of wheels, mounted while building and searched by pip (default: none)
#   WORK         where the base is made, 2 GB (default: /var/tmp/megatron_align_base)
#   STAGE        build up to this stage of the Dockerfile (default: image)
set -euo pipefail
cd "$(dirname "$0")/.."
tests=${1:-tests}
work=${WORK:-/var/tmp/megatron_align_base}
python_home=${PYTHON_HOME:-$(ls -d "$HOME"/.pyenv/versions/3.12.* | sort -V | tail -1)}
[ -x "$python_home/bin/python3.12" ] || { echo "error: PYTHON_HOME must be the prefix of a CPython 3.12, found $python_home" >&2; exit 1; }
for tool in debootstrap buildah; do
    command -v "$tool" > /dev/null || { echo "error: $tool is missing: apt-get install $tool" >&2; exit 1; }
done

root=$work/root
if [ ! -e "$work/made" ]; then
    mkdir -p "$work"
    # The libraries are those that a CPython built from source links to.
    debootstrap --variant=minbase \
        --include=ca-certificates,libbz2-1.0,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,libssl3,libuuid1,zlib1g \
        bookworm "$root"
    touch "$work/made"
fi
# This machine's way to packages: mirrors, certificates, pip's settings. So the base stays on this machine.
rm -rf "$root"/etc/apt/sources.list*
cp -a /etc/apt/sources.list* /etc/apt/apt.conf.d "$root/etc/apt/"
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
for file in /etc/pip.conf /etc/xdg/pip "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
    if [ -e "$file" ]; then
        mkdir -p "$root$(dirname "$file")"
        cp -r "$file" "$root$(dirname "$file")/"
    fi
done
cp -a "$python_home/." "$root/usr/local/" # before Debian's own in PATH
rm -rf "$root"/usr/local/lib/python3.12/{test,site-packages/torch*}
chroot "$root" ldconfig
chroot "$root" python3 -c "import ssl, sqlite3, lzma, bz2, ctypes, venv"

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
tar -C "$root" -cf "$context/base.tar" .
printf 'FROM scratch\nADD base.tar /\n' > "$context/Dockerfile"
# chroot isolation needs no runtime; the OCI format would drop SHELL.
build=(buildah bud --format docker --isolation chroot)
"${build[@]}" -q -t localhost/megatron_align_base "$context"
"${build[@]}" --build-arg BASE=localhost/megatron_align_base --build-arg "TESTS=$tests" --target "${STAGE:-image}" \
    ${WHEELS:+--volume "$WHEELS:$WHEELS:ro"} -t localhost/megatron_align .
buildah images | grep megatron_align

# lmm_qa on a CPU: the embedded model, or any model that fits into memory.
#
#     docker build -t lmm-qa .
#     docker run --rm -v "$PWD/clips:/clips:ro" lmm-qa rate /clips
FROM python:3.11-slim
WORKDIR /opt/lmm-qa
COPY . .
RUN pip install --no-cache-dir -c constraints.txt .
RUN useradd --create-home rater
USER rater
WORKDIR /home/rater
ENTRYPOINT ["lmm-qa"]
CMD ["--help"]
